// AMX's registers: eight of up to 16 rows of 64 bytes, whose shapes are configured before use. For files compiled with
// -mamx-tile.
#pragma once

#include <cstdint>

namespace kvshare::kernels {
namespace {

constexpr int kTileRows = 16;      // rows of a register, and columns of a product
constexpr int kTileSummed = 32;    // elements of a row that one product of bf16 sums
constexpr int kTileRowBytes = 64;  // 32 bf16 or 16 fp32

// What _tile_loadconfig reads (Intel 64 manual, LDTILECFG).
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

constexpr TileConfig WholeTiles() {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = kTileRowBytes;
    config.rows[t] = kTileRows;
  }
  return config;
}

}  // namespace
}  // namespace kvshare::kernels
