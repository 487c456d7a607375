#include "runtime/safetensors.h"

#include <gtest/gtest.h>

#include "tests/testing/gguf_writer.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::runtime {
namespace {

std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

std::string File(const std::string& header, std::size_t data_bytes) {
  return testing::LittleEndian64(header.size()) + header + std::string(data_bytes, '\x11');
}

std::string Entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

void ExpectRefused(const std::string& file, const std::string& text) {
  const auto result = ParseSafetensors(Bytes(file));
  KVS_EXPECT_FAILS(result, result.ok() ? StatusCode::kOk : result.status().code(), text);
  EXPECT_FALSE(result.ok()) << "should name " << text;
}

TEST(SafetensorsTest, TensorsAreWhereTheHeaderSays) {
  const auto weights = testing::TinyWeights({});
  for (const bool bf16 : {true, false}) {
    const std::string file = testing::SafetensorsBytes(weights, bf16);
    const auto tensors = ParseSafetensors(Bytes(file));
    KVS_ASSERT_OK(tensors);
    ASSERT_EQ(tensors->size(), weights.size());
    for (const auto& [name, weight] : weights) {
      const TensorView& tensor = tensors->find(name)->second;
      EXPECT_EQ(tensor.shape, weight.shape) << name;
      EXPECT_STREQ(tensor.type->name, bf16 ? "BF16" : "F32");
      std::vector<float> values(weight.values.size());
      DecodeRows(tensor, 0, tensor.rows(), values.data());
      EXPECT_EQ(values, weight.values) << name;
    }
  }
}

TEST(SafetensorsTest, ScalarsAndEmptyTensorsAndGapsAreFine) {
  const std::string header = R"({"s":)" + Entry("F32", "[]", "[0,4]") + R"(,"e":)" + Entry("F32", "[0,3]", "[8,8]") +
                             R"(,"t":)" + Entry("F16", "[2]", "[12,16]") + "}";
  const auto tensors = ParseSafetensors(Bytes(File(header, 16)));
  KVS_ASSERT_OK(tensors);
  EXPECT_EQ(tensors->find("s")->second.bytes.size(), 4u);
  EXPECT_EQ(tensors->find("e")->second.bytes.size(), 0u);
  EXPECT_EQ(tensors->find("t")->second.bytes.size(), 4u);
}

TEST(SafetensorsTest, EveryLieIsNamed) {
  ExpectRefused("", "truncated");
  ExpectRefused("1234567", "truncated");
  ExpectRefused(testing::LittleEndian64(std::uint64_t{1} << 62) + "{}", "length");
  ExpectRefused(testing::LittleEndian64(100) + "{}", "length");
  ExpectRefused(File("{\"a\":", 0), "JSON");
  ExpectRefused(File("\xff{}", 0), "JSON");
  ExpectRefused(File("[]", 0), "object");
  ExpectRefused(File(std::string(100000, '['), 0), "deeper");
  const auto one = [](const std::string& entry, std::size_t data = 64) { return File(R"({"w":)" + entry + "}", data); };
  ExpectRefused(one("3"), "'w'");
  ExpectRefused(one(Entry("Q7", "[4]", "[0,16]")), "Q7");
  ExpectRefused(one(Entry("Q4_0", "[32]", "[0,18]")), "Q4_0");  // ggml's types are not safetensors'
  ExpectRefused(one(R"({"shape":[4],"data_offsets":[0,16]})"), "dtype");
  ExpectRefused(one(R"({"dtype":4,"shape":[4],"data_offsets":[0,16]})"), "dtype");
  ExpectRefused(one(Entry("F32", "[3,5]", "[0,16]")), "shape");
  ExpectRefused(one(Entry("F32", "[-1,64]", "[0,16]")), "shape");
  ExpectRefused(one(Entry("F32", "[1.5]", "[0,16]")), "shape");
  ExpectRefused(one(Entry("F32", "4", "[0,16]")), "shape");
  ExpectRefused(one(Entry("F32", "[1,1,1,1,1,1,1,1,4]", "[0,16]")), "shape");
  ExpectRefused(one(Entry("F32", "[4294967296,4294967296,4294967296]", "[0,16]")), "shape");
  ExpectRefused(one(Entry("F32", "[18446744073709551615]", "[0,16]")), "shape");
  ExpectRefused(one(Entry("F32", "[4]", "[0,1125899906842624]")), "offset");
  ExpectRefused(one(Entry("F32", "[4]", "[64,0]")), "offset");
  ExpectRefused(one(Entry("F32", "[4]", "[-16,0]")), "offset");
  ExpectRefused(one(Entry("F32", "[4]", "[0]")), "offset");
  ExpectRefused(one(Entry("F32", "[4]", "[0,16]"), 15), "offset");
  ExpectRefused(one(Entry("F32", "[4]", "[18446744073709551600,18446744073709551615]")), "offset");
  ExpectRefused(
      File(R"({"a":)" + Entry("F32", "[4]", "[0,16]") + R"(,"b":)" + Entry("F32", "[4]", "[12,28]") + "}", 64),
      "overlap");
}

TEST(SafetensorsTest, BytesThatAreNoTensorsAreFound) {
  const auto check = [](const std::string& a, const std::string& b, std::size_t data) {
    const std::string file =
        File(R"({"a":)" + Entry("F32", "[4]", a) + R"(,"b":)" + Entry("F16", "[2]", b) + "}", data);
    const auto tensors = ParseSafetensors(Bytes(file));
    EXPECT_TRUE(tensors.ok()) << tensors.status().message();
    return CheckEveryByteClaimed(Bytes(file), *tensors).message();
  };
  EXPECT_EQ(check("[0,16]", "[16,20]", 20), "");
  EXPECT_EQ(check("[4,20]", "[0,4]", 20), "");
  EXPECT_EQ(check("[0,16]", "[16,20]", 21), "the file is 1 bytes longer than its tensors");
  EXPECT_EQ(check("[6,22]", "[0,4]", 22), "2 bytes before tensor 'a' belong to no tensor");
  EXPECT_EQ(check("[4,20]", "[20,24]", 24), "4 bytes before tensor 'a' belong to no tensor");
}

TEST(SafetensorsTest, EveryTruncationIsRefused) {
  testing::TinyModelOptions options;
  options.layers = 1;
  const std::string file = testing::SafetensorsBytes(testing::TinyWeights(options));
  for (std::size_t size = 0; size < file.size(); size += size < 2000 ? 1 : 997) {
    EXPECT_FALSE(ParseSafetensors(Bytes(file).first(size)).ok()) << size;
  }
}

}  // namespace
}  // namespace kvshare::runtime
