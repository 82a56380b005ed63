// How a group of group_norm or batch_norm lies in memory: runs of adjacent elements, cut into
// pieces. Where batch_norm has one number a channel and sample, a run would be one element: there
// several groups stand side by side, lanes of one walk.
#pragma once

#include "kernels.h"
#include "math/common.h"

namespace jops::JOPS_ISA {

// Adjacent elements of a group, the first one at `at`. With lanes, these belong to `length`
// channels from `channel` on, else to this one.
struct Piece {
  std::int64_t at, length, channel;
};

struct Walk {
  std::int64_t groups, of_sample, step;  // groups, those of a sample, and from one to the next one
  std::int64_t runs, run_step, run;      // of a group, from one to the next one, and of elements
  std::int64_t pieces, piece;            // of a run, and elements of each but the last one
  std::int64_t channels, channel_step, run_channel;  // all; from a group, or run, to the next one
  bool lanes;

  JOPS_HD std::int64_t units() const { return runs * pieces; }
  // Elements that a statistic is taken of.
  JOPS_HD std::int64_t count() const { return lanes ? runs : runs * run; }
  JOPS_HD std::int64_t sample(std::int64_t group) const { return group / of_sample; }

  // Unit `unit` of a group.
  JOPS_HD Piece operator()(std::int64_t group, std::int64_t unit) const {
    const std::int64_t at_run = unit / pieces, begin = (unit - at_run * pieces) * piece;
    const std::int64_t channel = group % of_sample * channel_step + at_run * run_channel;
    const std::int64_t end = lanes && channels - channel < run ? channels - channel : run;
    return {group * step + at_run * run_step + begin, end - begin < piece ? end - begin : piece,
            channel};
  }

  // Elements all over a group, up to about 1024 of them, for a first idea of their mean: the
  // beginnings of some of its units, at no regular distance, as the data may have one.
  JOPS_HD std::int64_t glimpses() const {
    const std::int64_t most = 1024 / (run < 64 ? run : 64), some = units() / 8;
    const std::int64_t count = some < 16 ? 16 : some < most ? some : most;
    return units() < count ? units() : count;
  }
  JOPS_HD Piece glimpse(std::int64_t group, std::int64_t index) const {
    const std::int64_t begin = units() * index / glimpses();
    const std::int64_t width = units() * (index + 1) / glimpses() - begin;
    const std::int64_t place = index * 0x9e37 & 0xffff;  // of 2^16, by the golden ratio
    Piece piece = (*this)(group, begin + (width * place >> 16));
    const std::int64_t even = 1024 / glimpses() / 64 * 64, most = even < 64 ? 64 : even;
    if (piece.length > most) piece.length = most;
    return piece;
  }
};

// With so many lanes; pieces of at most about `most` elements, a multiple of 64.
inline Walk walk_of(const Groups& g, std::int64_t lanes, std::int64_t most) {
  const auto up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  Walk w{};
  w.channels = g.channels;
  w.lanes = g.groups == 0 && g.inner == 1;
  if (g.groups > 0) {
    w.groups = g.outer * g.groups;
    w.of_sample = g.groups;
    w.runs = w.channel_step = g.channels / g.groups;
    w.run_channel = 1;
    w.run = w.run_step = g.inner;
    w.step = w.runs * g.inner;
  } else {
    w.channel_step = w.lanes ? lanes : 1;
    w.groups = w.of_sample = up(g.channels, w.channel_step);
    w.runs = g.outer;
    w.run = w.step = w.lanes ? lanes : g.inner;
    w.run_step = g.channels * g.inner;
  }
  w.piece = up(up(w.run, up(w.run, most)), 64) * 64;
  w.pieces = up(w.run, w.piece);
  return w;
}

}  // namespace jops::JOPS_ISA
