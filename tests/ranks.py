"""What two processes check together: ``python -m tests.ranks OUT`` runs all in one start.

A check is a function of no arguments that every rank calls; OUT gets its error on each, or null.
"""

import copy
import json
import os
import sys
import traceback

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import jacobian_ops
import jacobian_ops.functional as J

RANKS = 2
CHECKS = {}
R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
close = torch.testing.assert_close


def check(f):
    CHECKS[f.__name__] = f
    return f


def mesh():
    return init_device_mesh("cpu", (RANKS,))


def place(t, placement, requires_grad=False):
    d = distribute_tensor(t.detach(), mesh(), [placement])
    return d.requires_grad_() if requires_grad else d


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def raises(error, words, f):
    try:
        f()
    except error as e:
        assert words in str(e), str(e)
    else:
        raise AssertionError(f"{error.__name__} was not raised")


# ------------------------------------------------------------------- data parallel


class Block(nn.Module):
    """A bit of everything: attention, norm, residual, MLP, loss."""

    def __init__(self, p=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(p), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return self.head(x + self.mlp(x))


def block():
    """Ours, in float64; the same on every rank."""
    torch.manual_seed(1)
    return jacobian_ops.replace(Block().double())


def batch():
    torch.manual_seed(2)
    return torch.randn(4, 3, 8, dtype=torch.float64), torch.randint(5, (4, 3))


def local(t):
    return t.chunk(RANKS)[dist.get_rank()]


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model):
    return fully_shard(model)


def nested_fsdp(model):
    for layer in (model.attention, model.mlp, model.head):
        fully_shard(layer)
    return fully_shard(model)


def step(model, x, target):
    loss = J.cross_entropy(model(x).flatten(0, 1), target.flatten())
    loss.backward()
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}


def trains_as_one_process(wrap):
    x, target = batch()
    expected = step(block(), x, target)
    close(step(wrap(block()), local(x), local(target)), expected, rtol=1e-9, atol=1e-12)


@check
def ddp_gradients():
    trains_as_one_process(ddp)


@check
def fsdp_gradients():
    trains_as_one_process(fsdp)


@check
def nested_fsdp_gradients():
    trains_as_one_process(nested_fsdp)


@check
def fsdp_optimizer_and_state():
    """Three steps of AdamW, and a state_dict with the keys and values of one process."""
    x, target = batch()
    one, many = block(), nested_fsdp(block())
    for model, data in ((one, (x, target)), (many, (local(x), local(target)))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            step(model, *data)
            optimizer.step()
    state = {name: whole(t) for name, t in many.state_dict().items()}
    close(state, dict(one.state_dict()), rtol=1e-8, atol=1e-10)


def same_everywhere(t):
    others = [torch.empty_like(t) for _ in range(RANKS)]
    dist.all_gather(others, t.contiguous())
    return all(torch.equal(t, other) for other in others)


@check
def dropout_follows_the_seed_of_its_rank():
    for layer in (nn.Dropout(0.5), jacobian_ops.nn.Dropout(0.5)):
        for wrapped in (ddp, fsdp):
            model = wrapped(nn.Sequential(nn.Linear(64, 64), copy.deepcopy(layer)))
            for seed, same in ((0, True), (dist.get_rank(), False)):
                torch.manual_seed(seed)
                assert same_everywhere((model(torch.ones(8, 64)) != 0).double()) == same


def tangents(model, x, t):
    def dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, t))).tangent

    return torch.func.jvp(model, (x,), (t,))[1], jacobian_ops.jvp(model, (x,), (t,))[1], dual


def forward_mode(wrap):
    x = local(batch()[0])
    t = torch.randn_like(x)
    *expected, dual = tangents(block(), x, t)
    *given, wrapped_dual = tangents(wrap(block()), x, t)
    close(given, expected)
    return wrapped_dual, dual


@check
def jvp_through_ddp():
    given, expected = forward_mode(ddp)
    close(given(), expected())


@check
def jvp_through_fsdp():
    given, expected = forward_mode(fsdp)
    close(given(), expected())


@check
def jvp_through_nested_fsdp():
    """torch.func works; forward_ad meets the hook of an inner module, and torch says so."""
    given, _ = forward_mode(nested_fsdp)
    raises(RuntimeError, "jvp is not returning a view", given)


def trains_a_tangent(wrap):
    """A loss of a JVP, as of MeanFlow."""
    x, _ = batch()
    t = torch.randn_like(x)

    def gradients(model, x, t):
        y, ty = torch.func.jvp(model, (x,), (t,))
        (y - ty).square().mean().backward()
        return {n.removeprefix("module."): whole(p.grad) for n, p in model.named_parameters()}

    expected = gradients(block(), x, t)
    close(gradients(wrap(block()), local(x), local(t)), expected, rtol=1e-9, atol=1e-12)


@check
def trained_tangent_through_ddp():
    trains_a_tangent(ddp)


@check
def trained_tangent_through_fsdp():
    trains_a_tangent(nested_fsdp)


# ------------------------------------------------------------------- tensor parallel


def as_one_process(f, shapes, placements, result, targets=()):
    """Result, gradients and a second derivative of ``f`` with its arguments on two ranks."""
    torch.manual_seed(3)
    xs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    ds = [place(x, p, True) for x, p in zip(xs, placements, strict=True)]

    def run(*args):
        y = f(*args, *targets)
        first = torch.autograd.grad(y.square().sum(), args, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), args, allow_unused=True)
        return y, first, second

    expected, given = run(*xs), run(*ds)
    assert given[0].placements == (result,), given[0].placements
    pairs = zip(_leaves(given), _leaves(expected), strict=True)
    close(*zip(*((whole(a), b) for a, b in pairs if b is not None), strict=True))
    return given


def _leaves(results):
    y, first, second = results
    return y, *first, *second


@check
def elementwise():
    for p in (S0, S1, R):
        as_one_process(J.gelu, [(4, 6)], [p], p)
        as_one_process(J.swiglu, [(4, 6)] * 2, [p, p], p)


@check
def norms():
    for p in (S0, S1, R):
        shapes, places = [(4, 2, 6), (6,), (6,)], [p, R, R]
        as_one_process(lambda x, w, b: J.layer_norm(x, (6,), w, b), shapes, places, p)
        as_one_process(lambda x, w, b: J.rms_norm(x, (6,), w) + b, shapes, places, p)
    as_one_process(lambda x: J.layer_norm(x, (6,)), [(4, 6)], [S1], R)
    as_one_process(lambda x, r: J.add_layer_norm(x, r, (6,))[0], [(4, 6), (4, 6)], [S0, S0], S0)
    as_one_process(lambda x: J.group_norm(x, 2), [(4, 4, 3)], [S0], S0)


@check
def batch_norm_sees_the_whole_batch():
    f = lambda x: J.batch_norm(x, None, None, training=True)  # noqa: E731
    as_one_process(f, [(4, 3, 5)], [S0], R)
    for shape in ((4, 3, 5), (4, 3)):  # with running statistics, which every rank has
        as_one_process(with_running_statistics, [shape, (3,)], [S0, R], S0)


def with_running_statistics(x, weight):
    mean, var = torch.arange(3.0).double(), torch.arange(1.0, 4.0).double()
    if isinstance(x, DTensor):
        mean, var = place(mean, R), place(var, R)
    return J.batch_norm(x, mean, var, weight)


LINEAR = {  # of x, weight and bias, and of the result's rows or columns
    "rows": (S0, R, R),
    "columns": (R, S0, S0),
    "sums": (S1, S1, R),
    "all of them": (R, R, R),
    "what does not fit": (S0, S0, S0),
}


@check
def linear():
    for places in LINEAR.values():
        for f in (J.linear, lambda *a: J.linear_act_dropout(*a, "gelu")):
            torch.manual_seed(4)
            xs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
            ds = [place(x, p, True) for x, p in zip(xs, places, strict=True)]
            y, dy = f(*xs), f(*ds)
            close(whole(dy), y)
            first = torch.autograd.grad(y.square().sum(), xs, create_graph=True)
            dfirst = torch.autograd.grad(dy.square().sum(), ds, create_graph=True)
            close([whole(g) for g in dfirst], list(first))
            second = torch.autograd.grad(sum(g.sin().sum() for g in first), xs)
            dsecond = torch.autograd.grad(sum(g.sin().sum() for g in dfirst), ds)
            close([whole(g) for g in dsecond], list(second))


SHAPES = (4, 6), (8, 6), (8,)


@check
def flags_and_absent_arguments_are_told_apart():
    """Of the same op, with tensors of one kind: what DTensor remembers of a call must differ."""
    x, w = (place(torch.randn(6, 6), R, True) for _ in range(2))
    b = place(torch.randn(6), R, True)
    for wanted in ((x,), (w,), (x, w), (x, w, b), (b,)):
        given = [t if any(t is u for u in wanted) else t.detach() for t in (x, w, b)]
        gradients = torch.autograd.grad(J.linear(*given).square().sum(), wanted)
        plain = [whole(t).detach().requires_grad_() for t in (x, w, b)]
        expected = torch.autograd.grad(J.linear(*plain).square().sum(), plain)
        for t, g in zip(wanted, gradients, strict=True):
            i = next(i for i, u in enumerate((x, w, b)) if t is u)
            close(whole(g), expected[i])


@check
def rotary():
    shapes = [(2, 2, 4, 6), (4, 3), (4, 3)]
    as_one_process(J.rotary_embedding, shapes, [S1, R, R], S1)
    as_one_process(J.rotary_embedding, shapes, [S2, S0, S0], S2)


@check
def attention():
    def causal(q, k, v):
        return J.scaled_dot_product_attention(q, k, v, is_causal=True)

    def grouped(q, k, v):
        return J.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    for p, result in ((S0, S0), (S1, S1), (S2, R)):  # of batches, heads, queries
        as_one_process(causal, [(2, 4, 6, 8)] * 3, [p] * 3, result)
        as_one_process(grouped, [(2, 4, 6, 8), *[(2, 2, 6, 8)] * 2], [p] * 3, result)


@check
def softmax_over_a_sharded_dimension():
    for f in (J.softmax, J.log_softmax, J.softmin):
        for p in (S0, S1):
            for dim in (0, -1):
                as_one_process(lambda x: f(x, dim), [(4, 6)], [p], p)  # noqa: B023


TARGET = torch.tensor([0, 3, 5, -100])


@check
def cross_entropy_over_sharded_classes():
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "sum"}):

        def f(x, target, options=options):
            return J.cross_entropy(x, target, **options)

        as_one_process(f, [(4, 6)], [S1], R, [TARGET])
        as_one_process(f, [(4, 6)], [R], R, [TARGET])
    for rows, shape in ((S1, (4, 6, 3)), (S2, (4, 6, 2))):
        target = torch.randint(6, (shape[0], shape[2]), generator=torch.Generator().manual_seed(0))
        f = lambda x, t: J.cross_entropy(x, t, reduction="none")  # noqa: E731
        result = R if rows == S1 else S1
        as_one_process(f, [shape], [rows], result, [target])
    uneven = lambda x, t: J.cross_entropy(x, t, reduction="none")  # noqa: E731
    as_one_process(uneven, [(4, 7)], [S1], R, [TARGET])
    one_class = TARGET.clamp(max=0)
    as_one_process(uneven, [(4, 1)], [S1], R, [one_class])  # nothing on the other rank
    x = place(torch.randn(4, 6), S1)
    raises(IndexError, "target has class 6", lambda: J.cross_entropy(x, torch.tensor([0, 1, 6, 2])))


@check
def cross_entropy_of_sharded_rows_and_probabilities():
    def loss(x, target):
        return J.cross_entropy(x, place(target, S0) if isinstance(x, DTensor) else target)

    as_one_process(lambda x, t: loss(x, t).sum(), [(4, 6)], [S0], loss_of_rows(), [TARGET])
    p = torch.randn(4, 6, dtype=torch.float64).softmax(-1)
    for places in (S0, S1):
        d = place(torch.randn(4, 6, dtype=torch.float64), places)
        close(whole(J.cross_entropy(d, p)), J.cross_entropy(whole(d), p))


def loss_of_rows():
    """Sums of rows over counts of rows: DTensor adds the former up when they are asked for."""
    x = place(torch.randn(4, 6), S0)
    return J.cross_entropy(x, place(TARGET, S0)).placements[0]


@check
def sharded_classes_send_a_number_a_row():
    """Neither the loss nor its gradient gathers the logits."""
    x = place(torch.randn(3, 1000), S1, True)
    target = torch.tensor([1, 400, 999])
    with CommDebugMode() as forward:
        loss = J.cross_entropy(x, target)
    with CommDebugMode() as backward:
        loss.backward()
    assert forward.get_total_counts() == 2 and backward.get_total_counts() == 0
    assert x.grad.placements == (S1,)
    with CommDebugMode() as softmax:
        assert J.softmax(x, 1).placements == (S1,)
    assert softmax.get_total_counts() == 1


@check
def linear_cross_entropy_with_sharded_classes():
    for p, w in ((R, S0), (S0, R), (S1, S1)):
        as_one_process(lambda x, w, t: whole_loss(x, w, t), [(4, 6), (8, 6)], [p, w], R, [TARGET])


def whole_loss(x, w, target):
    loss = J.linear_cross_entropy(x, w, place(target, R) if isinstance(x, DTensor) else target)
    return loss.redistribute(placements=[R]) if isinstance(x, DTensor) else loss


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(x + self.mlp(self.norm(x)))


@check
def megatron():
    """Column- and row-parallel layers, and a loss over sharded classes."""
    torch.manual_seed(5)
    one = jacobian_ops.replace(Mlp().double())
    many = parallelize_module(
        copy.deepcopy(one),
        mesh(),
        {
            "mlp.0": ColwiseParallel(),
            "mlp.2": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        },
    )
    x, target = torch.randn(2, 6, 8, dtype=torch.float64), torch.randint(10, (12,))
    for model in (one, many):
        J.cross_entropy(model(x).flatten(0, 1), target).backward()
    close(
        {n: whole(p.grad) for n, p in many.named_parameters()},
        {n: p.grad for n, p in one.named_parameters()},
    )


@check
def dropout_of_shards():
    """Other masks on other shards, the same on replicas, and one mask in forward and backward."""
    torch.manual_seed(6)
    for f in (
        lambda x: J.dropout(x, 0.5),
        lambda x: J.dropout_add(x, x.detach() * 0, 0.5),
        lambda x: J.linear_act_dropout(x, place(torch.eye(64), R), None, "identity", 0.5),
    ):
        x = place(torch.ones(16, 64), S0, True)
        y = f(x)
        y.sum().backward()
        close(whole(x.grad) != 0, whole(y) != 0)
        halves = (whole(y) != 0).double().chunk(2)
        assert not torch.equal(*halves) and 0.4 < halves[0].mean() < 0.6
        y = f(place(torch.ones(16, 64), R))
        assert same_everywhere(y.to_local())
    y = J.softmax_dropout(place(torch.zeros(16, 64), S1), -1, 0.5)
    kept = (whole(y) != 0).double()
    assert y.placements == (S1,) and 0.4 < kept.mean() < 0.6


@check
def dropout_of_attention_heads():
    torch.manual_seed(7)
    v = torch.eye(16).expand(1, 4, 16, 16)
    q = torch.zeros(1, 4, 16, 16)
    for p, kept in ((S1, S1), (S2, R)):
        given = [place(t, p, True) for t in (q, q, v)]
        o = J.scaled_dot_product_attention(*given, dropout_p=0.5)
        assert o.placements == (kept,)
        masks = (whole(o) != 0).double()
        assert 0.4 < masks.mean() < 0.6 and not torch.equal(masks[:, 0], masks[:, 2])
        o.sum().backward()  # of v, whose rows then are sums of the weights of its key
        close(whole(given[2].grad)[..., 0], whole(o).sum(-2))
        assert p is not S2 or same_everywhere(o.to_local())


@check
def two_dimensional_mesh():
    grid = init_device_mesh("cpu", (1, RANKS))
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    d = distribute_tensor(x.detach(), grid, [S0, S1]).requires_grad_()
    for f in (
        J.silu,
        lambda x: J.softmax(x, -1),
        lambda x: J.cross_entropy(x, TARGET[[0, 1, 2, 0]]),
    ):
        close(whole(f(d)), f(x))
        given, expected = (torch.autograd.grad(f(z).square().sum(), z) for z in (d, x))
        close(whole(given[0]), expected[0])


@check
def forward_mode_of_sharded_tensors_raises():
    """DTensor has none, for native ops neither."""
    x = place(torch.randn(4, 6), S0)
    for f in (J.gelu, nn.functional.gelu, lambda x: J.softmax(x, -1)):
        words = "does not have a sharding strategy"
        raises(NotImplementedError, words, lambda: torch.func.jvp(f, (x,), (x,)))  # noqa: B023


# ------------------------------------------------------------------- the start


def _run(rank, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    errors = {}
    for name, f in CHECKS.items():
        torch.manual_seed(0)
        try:
            f()
            errors[name] = None
        except Exception:
            errors[name] = traceback.format_exc()
    with open(f"{out}.{rank}", "w") as file:
        json.dump(errors, file)
    dist.destroy_process_group()


def main(out):
    """Run every check on all ranks; ``out`` gets a list of their errors by name."""
    torch.multiprocessing.start_processes(
        _run, (f"{out}.store", out), nprocs=RANKS, start_method="fork"
    )
    ranks = [json.load(open(f"{out}.{rank}")) for rank in range(RANKS)]
    with open(out, "w") as file:
        json.dump({name: [errors[name] for errors in ranks] for name in CHECKS}, file)


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    main(sys.argv[1])
