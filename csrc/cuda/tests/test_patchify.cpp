// SPDX-License-Identifier: Apache-2.0
#include "glimpse/patchify.h"

#include "cuda/tests/harness.h"

namespace glimpse::tests {
namespace {

struct Picture {
  int64_t groups_y, groups_x, patch, merge, frames;
  int64_t padding = 0;  // bytes between two rows of the picture
  size_t begin = 0;     // bytes in front of the picture
};

// Each pixel where it belongs, by the formula of the header.
std::vector<float> patches(const std::vector<uint8_t>& picture, const Picture& s, const glimpse_patchify_params& p) {
  const int64_t side = s.patch * s.merge, area = s.patch * s.patch, row = 3 * s.frames * area;
  std::vector<float> wanted;
  for (int64_t group = 0; group < s.groups_y * s.groups_x; ++group)
    for (int64_t member = 0; member < s.merge * s.merge; ++member)
      for (int64_t i = 0; i < row; ++i) {
        const int64_t c = i / (s.frames * area), pixel = i % area;
        const int64_t y = group / s.groups_x * side + member / s.merge * s.patch + pixel / s.patch;
        const int64_t x = group % s.groups_x * side + member % s.merge * s.patch + pixel % s.patch;
        const uint8_t byte = picture[s.begin + static_cast<size_t>(y * p.image_stride + 3 * x + c)];
        wanted.push_back((static_cast<float>(byte * p.rescale) - p.mean[c]) / p.std[c]);
      }
  return wanted;
}

// `shift`: values in front of the result, which stay.
void check(const Picture& s, size_t shift = 0) {
  glimpse_patchify_params p{};
  p.height = p.out_height = s.groups_y * s.patch * s.merge;
  p.width = p.out_width = s.groups_x * s.patch * s.merge;
  p.image_stride = 3 * p.width + s.padding;
  p.patch_size = s.patch;
  p.merge_size = s.merge;
  p.frames = s.frames;
  p.rescale = 1 / 255.0;
  for (int c = 0; c < 3; ++c) {
    p.mean[c] = 0.25f + 0.125f * static_cast<float>(c);
    p.std[c] = 0.5f - 0.0625f * static_cast<float>(c);
  }
  std::vector<uint8_t> picture(s.begin + static_cast<size_t>(p.height * p.image_stride - s.padding));  // nothing behind the last row
  for (size_t i = 0; i < picture.size(); ++i) picture[i] = static_cast<uint8_t>(i * 37 + i / 251);
  std::vector<float> wanted = patches(picture, s, p);
  const Buffer<uint8_t> image(picture);
  p.image = image.data() + s.begin;

  const Buffer<float> out(shift + wanted.size());
  p.dtype = GLIMPSE_FLOAT32;
  p.out = out.data() + shift;
  expect_ok(glimpse_cuda_patchify(&p, call()));
  std::vector<float> whole = Buffer<float>(shift).read();
  whole.insert(whole.end(), wanted.begin(), wanted.end());
  expect_equal(out.read(), whole, "float32");

  std::vector<uint16_t> rounded(shift, 0xffff);
  for (const float x : wanted) rounded.push_back(to_bfloat16(x));
  const Buffer<uint16_t> half(rounded.size());
  p.dtype = GLIMPSE_BFLOAT16;
  p.out = half.data() + shift;
  expect_ok(glimpse_cuda_patchify(&p, call()));
  expect_equal(half.read(), rounded, "bfloat16");
}

}  // namespace

TEST(patchify_as_qwen) { check({2, 3, 14, 2, 2}); }
TEST(patchify_rows_apart) { check({3, 1, 14, 2, 2, 7}); }
TEST(patchify_rows_of_words) { check({1, 2, 14, 2, 2, 8}); }
TEST(patchify_anywhere) {
  for (const size_t shift : {1, 2, 3}) check({1, 2, 14, 2, 2, 4, 4 - shift}, shift);
}
TEST(patchify_odd_patches) { check({2, 2, 5, 3, 1, 1}); }
TEST(patchify_other_patches) {
  check({2, 2, 16, 2, 2});
  check({1, 3, 14, 1, 3});
  check({2, 1, 2, 3, 2});
  check({1, 1, 14, 3, 1});
}
TEST(patchify_pixels) {
  for (const int processors : {1, 132}) {  // several groups a block, the last one of a row with fewer, and one
    set_chip(90, processors);
    check({3, 37, 1, 1, 1});
    check({4, 13, 3, 2, 2});
    check({2, 11, 14, 2, 2});
  }
}
TEST(patchify_large_groups) {
  for (const int64_t patch : {124, 126, 128}) check({1, 1, patch, 1, 1});  // about 48 KiB of shared memory
  set_chip(86, 2);  // the least shared memory
  check({1, 2, 181, 1, 1});
}
TEST(patchify_nothing) {
  check({0, 3, 14, 2, 2});
  check({3, 0, 14, 2, 2});
}
TEST(patchify_refuses) {
  glimpse_patchify_params p{};
  p.height = p.out_height = p.width = p.out_width = 364;
  p.image_stride = 3 * 364;
  p.patch_size = 182;
  p.merge_size = p.frames = 1;
  expect(glimpse_cuda_patchify(&p, call()) == GLIMPSE_UNSUPPORTED, "a group of 182 pixels was taken");
  p.patch_size = 14;
  p.width = 360;
  expect(glimpse_cuda_patchify(&p, call()) == GLIMPSE_UNSUPPORTED, "a resize was taken");
  p.out_width = 360;
  expect(glimpse_cuda_patchify(&p, call()) == GLIMPSE_INVALID, "360 pixels were cut into patches of 14");
}

}  // namespace glimpse::tests
