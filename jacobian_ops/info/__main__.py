"""`python -m jacobian_ops.info`: print what was built and what runs, one fact a line."""

from . import build_info


def lines(facts: dict, prefix: str = ""):
    """Yield (name, text) pairs; a nested dict gives one pair an entry."""
    for name, value in facts.items():
        name = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            yield from lines(value, f"{name} ")
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main():
    """Print the table."""
    pairs = list(lines(build_info()))
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    main()
