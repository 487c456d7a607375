#include "runtime/gguf.h"

#include <gtest/gtest.h>

#include "tests/testing/gguf_writer.h"
#include "tests/testing/status_matchers.h"

namespace kvshare::runtime {
namespace {

using testing::GgufWriter;
using testing::LittleEndian32;
using testing::LittleEndian64;

std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

void ExpectRefused(const std::string& file, const std::string& text) {
  const auto result = Gguf::Parse(Bytes(file));
  EXPECT_FALSE(result.ok()) << "should name " << text;
  EXPECT_THAT(result.status().message(), ::testing::HasSubstr(text));
}

std::string Head(std::uint64_t tensors, std::uint64_t values, std::uint32_t version = 3) {
  return "GGUF" + LittleEndian32(version) + LittleEndian64(tensors) + LittleEndian64(values);
}

std::string Text(const std::string& text) { return LittleEndian64(text.size()) + text; }

TEST(GgufTest, ValuesAndTensorsComeBackAsWritten) {
  for (const std::uint32_t version : {2u, 3u}) {
    GgufWriter writer(version);
    writer.AddString("s", "text");
    writer.AddU32("u", 7);
    writer.AddF32("f", 1.5f);
    writer.AddBool("b", true);
    writer.AddStrings("ss", {"a", "", "c"});
    writer.AddInts("is", {1, -2, 3});
    writer.AddTensor("t", {2, 3}, 0, std::string(24, '\x01'));
    writer.AddTensor("q", {64}, 8, std::string(68, '\x02'));
    const std::string file = writer.Finish();
    const auto gguf = Gguf::Parse(Bytes(file));
    KVS_ASSERT_OK(gguf);
    EXPECT_EQ(gguf->GetString("s").value(), "text");
    EXPECT_EQ(gguf->GetInt("u", 0, 10).value(), 7);
    EXPECT_EQ(gguf->GetFloat("f").value(), 1.5);
    EXPECT_TRUE(gguf->GetBool("b", false).value());
    EXPECT_EQ(gguf->GetStrings("ss").value(), (std::vector<std::string_view>{"a", "", "c"}));
    EXPECT_EQ(gguf->GetInts("is").value(), (std::vector<std::int64_t>{1, -2, 3}));
    const TensorView& t = gguf->tensors().find("t")->second;
    EXPECT_EQ(t.shape, (std::vector<std::int64_t>{2, 3}));
    EXPECT_EQ(t.bytes.size(), 24u);
    EXPECT_EQ(t.bytes[0], std::byte{1});
    EXPECT_EQ(gguf->tensors().find("q")->second.bytes[67], std::byte{2});
  }
}

TEST(GgufTest, WrongTypesRangesAndAbsenceNameTheKey) {
  GgufWriter writer;
  writer.AddString("s", "text");
  writer.AddU32("u", 7);
  writer.AddInts("is", {1});
  writer.AddStrings("ss", {"a"});
  writer.AddF32("nan", std::numeric_limits<float>::quiet_NaN());
  const std::string file = writer.Finish();
  const auto gguf = Gguf::Parse(Bytes(file));
  KVS_ASSERT_OK(gguf);
  constexpr auto kCode = StatusCode::kInvalidArgument;
  KVS_EXPECT_FAILS(gguf->GetInt("none", 0, 1), kCode, "'none' is missing");
  EXPECT_EQ(gguf->GetInt("none", 0, 1, 5).value(), 5);
  KVS_EXPECT_FAILS(gguf->GetInt("s", 0, 1), kCode, "'s'");
  KVS_EXPECT_FAILS(gguf->GetInt("u", 0, 6), kCode, "'u' is 7");
  KVS_EXPECT_FAILS(gguf->GetInt("is", 0, 6), kCode, "'is'");
  KVS_EXPECT_FAILS(gguf->GetFloat("u"), kCode, "'u'");
  KVS_EXPECT_FAILS(gguf->GetFloat("nan"), kCode, "'nan'");
  KVS_EXPECT_FAILS(gguf->GetBool("u", true), kCode, "'u'");
  KVS_EXPECT_FAILS(gguf->GetString("u"), kCode, "'u'");
  KVS_EXPECT_FAILS(gguf->GetStrings("is"), kCode, "'is'");
  KVS_EXPECT_FAILS(gguf->GetStrings("s"), kCode, "'s'");
  KVS_EXPECT_FAILS(gguf->GetInts("ss"), kCode, "'ss'");
}

TEST(GgufTest, EveryLieIsNamed) {
  ExpectRefused("", "magic");
  ExpectRefused("GGML" + std::string(40, '\0'), "not a GGUF");
  ExpectRefused(Head(0, 0, 1), "version 1");
  ExpectRefused(Head(0, 0, 0x03000000), "big-endian");
  // Counts that the file cannot hold end at its end, before anything of their size is allocated.
  ExpectRefused(Head(0, ~std::uint64_t{0}), "truncated");
  ExpectRefused(Head(~std::uint64_t{0}, 0), "truncated");
  ExpectRefused(Head(0, 1) + LittleEndian64(~std::uint64_t{0}) + "k", "truncated");
  ExpectRefused(Head(0, 1) + Text(""), "name");
  ExpectRefused(Head(0, 1) + Text("k") + LittleEndian32(13), "'k'");
  ExpectRefused(Head(0, 1) + Text("k") + LittleEndian32(9) + LittleEndian32(9) + LittleEndian64(1), "nests");
  ExpectRefused(Head(0, 1) + Text("k") + LittleEndian32(9) + LittleEndian32(4) + LittleEndian64(~std::uint64_t{0}),
                "truncated");
  ExpectRefused(Head(0, 1) + Text("k") + LittleEndian32(9) + LittleEndian32(8) + LittleEndian64(~std::uint64_t{0}),
                "truncated");
  {
    GgufWriter twice;
    twice.AddU32("k", 1);
    twice.AddU32("k", 2);
    ExpectRefused(twice.Finish(), "twice");
  }
  {
    GgufWriter alignment;
    alignment.AddU32("general.alignment", 24);
    ExpectRefused(alignment.Finish(), "general.alignment");
  }
  const auto tensor = [](std::vector<std::int64_t> shape, std::uint32_t type, std::size_t bytes) {
    GgufWriter writer;
    writer.AddTensor("t", shape, type, std::string(bytes, '\0'));
    return writer.Finish();
  };
  KVS_EXPECT_OK(Gguf::Parse(Bytes(tensor({1, 32}, 8, 34))));
  ExpectRefused(tensor({}, 0, 0), "dimensions");
  ExpectRefused(tensor({1, 1, 1, 1, 1}, 0, 4), "dimensions");
  ExpectRefused(tensor({0}, 0, 4), "dimension");
  ExpectRefused(tensor({-1}, 0, 4), "dimension");
  ExpectRefused(tensor({std::int64_t{1} << 40, std::int64_t{1} << 40}, 0, 4), "memory");
  ExpectRefused(tensor({33}, 8, 34), "blocks");
  ExpectRefused(tensor({32}, 12, 34), "type 12");
  ExpectRefused(tensor({100}, 0, 32), "truncated: tensor 't' needs bytes");
}

// The tensor table's last field is the last tensor's offset; the writer pads only after it.
TEST(GgufTest, OffsetsAreCheckedAgainstFileAlignmentAndEachOther) {
  const auto with_offset = [](std::uint64_t offset) {
    std::string head = Head(2, 0);
    for (const auto& [name, at] : {std::pair<std::string, std::uint64_t>{"a", 0}, {"b", offset}}) {
      head += Text(name) + LittleEndian32(1) + LittleEndian64(16) + LittleEndian32(0) + LittleEndian64(at);
    }
    head.resize((head.size() + 31) / 32 * 32);
    return head + std::string(128, '\0');
  };
  KVS_EXPECT_OK(Gguf::Parse(Bytes(with_offset(64))));
  ExpectRefused(with_offset(65), "aligned");
  ExpectRefused(with_offset(32), "overlaps");
  ExpectRefused(with_offset(96), "truncated: tensor 'b'");
  ExpectRefused(with_offset(std::uint64_t{1} << 62), "truncated: tensor 'b'");
  ExpectRefused(with_offset(~std::uint64_t{31}), "offset");
}

TEST(GgufTest, EveryTruncationIsRefused) {
  testing::TinyModelOptions options;
  options.layers = 1;
  const std::string file = testing::TinyGguf(options);
  KVS_EXPECT_OK(Gguf::Parse(Bytes(file)));
  // The last tensor ends at a multiple of 32 here, so that every cut takes something away.
  for (std::size_t size = 0; size < file.size(); size += size < 3000 ? 1 : 997) {
    EXPECT_FALSE(Gguf::Parse(Bytes(file).first(size)).ok()) << size;
  }
  EXPECT_FALSE(Gguf::Parse(Bytes(file).first(file.size() - 1)).ok());
}

}  // namespace
}  // namespace kvshare::runtime
