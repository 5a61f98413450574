// SPDX-License-Identifier: Apache-2.0
#include "glimpse/compact.h"

#include <memory>

#include "cuda/tests/harness.h"

namespace glimpse::tests {
namespace {

using Bytes = std::vector<unsigned char>;

Bytes random_bytes(size_t count, uint64_t seed) {
  Bytes found;
  for (const int32_t x : random_ints(count, 256, seed)) found.push_back(static_cast<unsigned char>(x));
  return found;
}

// A copy and its memory, which ends with its last row.
struct Set {
  glimpse_compact_copy copy{};
  Buffer<unsigned char> src, dst;
  size_t src_offset, dst_offset;  // of the first row

  // `gap` bytes between two rows of the source, twice as many between those of the destination.
  Set(int64_t layers, int64_t src_rows, int64_t dst_rows, int64_t row_bytes, int64_t gap, bool to_slots, size_t before_src = 0,
      size_t before_dst = 0)
      : src(random_bytes(before_src + bytes(layers, src_rows, row_bytes, gap), static_cast<uint64_t>(row_bytes + layers))),
        dst(before_dst + bytes(layers, dst_rows, row_bytes, 2 * gap)), src_offset(before_src), dst_offset(before_dst) {
    copy.src = src.data() + before_src;
    copy.dst = dst.data() + before_dst;
    copy.layers = layers;
    copy.src_rows = src_rows;
    copy.dst_rows = dst_rows;
    copy.row_bytes = row_bytes;
    copy.src_stride = row_bytes + gap;
    copy.dst_stride = row_bytes + 2 * gap;
    copy.src_layer_stride = src_rows * copy.src_stride;
    copy.dst_layer_stride = dst_rows * copy.dst_stride;
    copy.to_slots = to_slots ? 1 : 0;
  }

  static size_t bytes(int64_t layers, int64_t rows, int64_t row_bytes, int64_t gap) {
    return layers * rows == 0 ? 0 : static_cast<size_t>(layers * rows * (row_bytes + gap) - gap);
  }

  void follow(Bytes& wanted, const Bytes& from, const std::vector<int32_t>& index, const std::vector<int32_t>& slots) const {
    for (int64_t layer = 0; layer < copy.layers; ++layer)
      for (size_t i = 0; i < index.size(); ++i) {
        const int64_t row = index[i], to = copy.to_slots ? slots[i] : static_cast<int64_t>(i);
        if (row < 0 || row >= copy.src_rows || to < 0 || to >= copy.dst_rows) continue;
        for (int64_t b = 0; b < copy.row_bytes; ++b)
          wanted[dst_offset + static_cast<size_t>(layer * copy.dst_layer_stride + to * copy.dst_stride + b)] =
              from[src_offset + static_cast<size_t>(layer * copy.src_layer_stride + row * copy.src_stride + b)];
      }
  }
};

void check(const std::vector<int32_t>& index, const std::vector<int32_t>& slots, const std::vector<const Set*>& sets) {
  const Buffer<int32_t> index_here(index), slots_here(slots);
  std::vector<glimpse_compact_copy> copies;
  std::vector<Bytes> wanted;
  for (const Set* set : sets) {
    copies.push_back(set->copy);
    wanted.push_back(set->dst.read());
    set->follow(wanted.back(), set->src.read(), index, slots);
  }
  glimpse_compact_params p{};
  p.index = index_here.data();
  p.slots = slots.empty() ? nullptr : slots_here.data();
  p.count = static_cast<int64_t>(index.size());
  p.copies = copies.data();
  p.copy_count = static_cast<int64_t>(copies.size());
  expect_ok(glimpse_cuda_compact(&p, call()));
  for (size_t i = 0; i < sets.size(); ++i) expect_equal(sets[i]->dst.read(), wanted[i], "destination");
}

// `count` different numbers below `of`, where `step` and `of` have no common factor.
std::vector<int32_t> places(size_t count, int32_t step, int32_t of) {
  std::vector<int32_t> found;
  for (size_t i = 0; i < count; ++i) found.push_back(static_cast<int32_t>(static_cast<int64_t>(i) * step % of));
  return found;
}

}  // namespace

TEST(compact_keys_values_and_rows) {
  const Set keys(3, 90, 101, 256, 0, true), values(3, 90, 101, 512, 0, true), hidden(1, 90, 70, 1792, 0, false);
  const Set positions(3, 90, 70, 8, 0, false), cosines(1, 90, 64, 160, 32, false);
  auto index = places(64, 7, 90), slots = places(64, 13, 101);
  for (const size_t dead : {3, 17, 60, 61, 62, 63}) index[dead] = -1;
  for (const size_t dead : {0, 5}) slots[dead] = -1;
  check(index, slots, {&keys, &values, &hidden, &positions, &cosines});
}

// 64 tasks keep a multiprocessor busy; of what is beyond, a task takes up to four passes of 256 units.
TEST(compact_tasks_of_several_passes) {
  for (const int64_t which : {0, 1, 2, 3, 4, 5}) {  // tasks of 1 to 4 passes
    const int64_t layers = 1 + which / 2;
    set_chip(90, 1 + static_cast<int>(which % 2));
    const Set keys(layers, 90, 101, 512, 0, true), hidden(layers, 90, 70, 1792, 16, false);
    const Set bytes(layers, 90, 101, 331, 1, true), positions(layers, 90, 70, 8, 0, false);
    auto index = places(64, 7, 90), slots = places(64, 13, 101);
    for (const size_t dead : {0, 1, 2, 3, 17, 30, 31, 60, 61, 62, 63}) index[dead] = -1;
    for (size_t dead = 36; dead < 48; ++dead) slots[dead] = -1;
    check(index, slots, {&keys, &hidden, &bytes, &positions});
  }
}

TEST(compact_many_layers) {
  const Set keys(80, 4, 5, 32, 0, true), values(80, 4, 5, 20, 0, true);
  check({3, -1, 0}, {4, 1, 2}, {&keys, &values});
}

// A row for all entries, and rows and layers that follow each other backwards.
TEST(compact_strides_of_zero_and_below) {
  const Set keys(3, 7, 6, 48, 16, true);
  const auto index = places(5, 3, 7), slots = places(5, 5, 6);
  Set one(3, 7, 6, 48, 16, true), back(3, 7, 6, 48, 16, true);
  one.copy.src_stride = one.copy.src_layer_stride = 0;
  one.src_offset = 64;
  one.copy.src = one.src.data() + one.src_offset;
  back.src_offset = static_cast<size_t>(2 * back.copy.src_layer_stride + 6 * back.copy.src_stride);
  back.dst_offset = static_cast<size_t>(2 * back.copy.dst_layer_stride + 5 * back.copy.dst_stride);
  back.copy.src = back.src.data() + back.src_offset;
  back.copy.dst = back.dst.data() + back.dst_offset;
  for (int64_t* stride : {&back.copy.src_stride, &back.copy.src_layer_stride, &back.copy.dst_stride, &back.copy.dst_layer_stride})
    *stride = -*stride;
  check(index, slots, {&keys, &one, &back});
}

TEST(compact_rows_of_every_length) {
  const auto index = places(11, 3, 13);
  for (const int64_t length : {1, 2, 3, 5, 8, 12, 16, 24, 48, 255, 257, 1000, 4096, 4112, 12304})
    for (const int64_t gap : {0, 1, 16}) {
      const Set set(2, 13, 11, length, gap, false);
      check(index, {}, {&set});
    }
}

TEST(compact_addresses_of_every_alignment) {
  const auto index = places(6, 5, 9), slots = places(6, 4, 7);
  for (const size_t src : {0, 1, 2, 4, 8, 16})
    for (const size_t dst : {0, 6, 8}) {
      const Set set(2, 9, 7, 48, 0, true, src, dst);
      check(index, slots, {&set});
    }
}

TEST(compact_skips_what_is_outside) {
  const int32_t most = INT32_MAX, least = INT32_MIN;
  const Set keys(2, 5, 6, 64, 0, true), rows(1, 7, 4, 16, 0, false);
  check({0, 5, most, 4, -2, least, 6, 3}, {5, 1, 2, 6, 3, 4, most, 0}, {&keys, &rows});
}

TEST(compact_more_copies_than_a_launch_takes) {
  std::vector<std::unique_ptr<Set>> sets;
  std::vector<const Set*> all;
  for (int64_t i = 0; i < 70; ++i) {
    sets.push_back(std::make_unique<Set>(i % 3, 6, 5, 4 + i, 0, false));  // each third without a plane
    all.push_back(sets.back().get());
  }
  check({5, -1, 0, 2}, {}, all);
}

TEST(compact_nothing) {
  const Set keys(2, 5, 6, 64, 0, true), empty(1, 0, 6, 64, 0, true);
  check({}, {}, {});
  check({1, 2}, {3, 4}, {});
  check({-1, -1}, {0, 1}, {&keys});
  check({0, 1}, {-1, -1}, {&keys});
  check({0, 1}, {2, 3}, {&empty});
}

TEST(compact_refuses) {
  Set keys(2, 5, 6, 64, 0, true);
  const Buffer<int32_t> index(std::vector<int32_t>{1});
  glimpse_compact_params p{};
  p.index = index.data();
  p.copies = &keys.copy;
  p.count = p.copy_count = 1;
  expect(glimpse_cuda_compact(&p, call()) == GLIMPSE_INVALID, "slots were not missed");
  p.slots = index.data();
  p.count = -1;
  expect(glimpse_cuda_compact(&p, call()) == GLIMPSE_INVALID, "a negative count was taken");
  p.count = int64_t{1} << 31;
  expect(glimpse_cuda_compact(&p, call()) == GLIMPSE_INVALID, "a count of 2^31 was taken");
  p.count = 1;
  keys.copy.layers = int64_t{1} << 40;
  expect(glimpse_cuda_compact(&p, call()) == GLIMPSE_UNSUPPORTED, "2^40 layers were taken");
  expect_equal(keys.dst.read(), Bytes(keys.dst.size(), 0xff), "destination");
}

TEST(compact_captured_short_replayed_long) {
  const size_t capacity = 40;
  const Set keys(2, 50, 60, 128, 0, true);
  const Buffer<int32_t> slots(places(capacity, 7, 60));
  Buffer<int32_t> index(std::vector<int32_t>(capacity, -1));
  glimpse_compact_params p{};
  p.index = index.data();
  p.slots = slots.data();
  p.count = capacity;
  p.copies = &keys.copy;
  p.copy_count = 1;
  const glimpse_cuda_call* const how = call();
  Graph graph([&] { expect_ok(glimpse_cuda_compact(&p, how)); });
  for (const size_t alive : {size_t{0}, size_t{40}, size_t{9}}) {
    auto entries = places(capacity, 11, 50);
    for (size_t i = alive; i < capacity; ++i) entries[i] = -1;
    index.write(entries);
    Bytes wanted = keys.dst.read();
    keys.follow(wanted, keys.src.read(), entries, slots.read());
    graph.replay();
    expect_equal(keys.dst.read(), wanted, "destination");
  }
}

}  // namespace glimpse::tests
