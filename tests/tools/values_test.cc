// Command-line values, .npy headers, percentiles, suggestions, and the files that commands read.
#include "tools/kvctl/values.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "libkvshare/core/suggest.h"
#include "tools/kvctl/files.h"
#include "tools/kvctl/npy.h"
#include "tools/trace/summary.h"

namespace kvshare::kvctl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(ValuesTest, DurationsHaveUnits) {
  EXPECT_EQ(ParseDuration("30s").value().count(), 30000);
  EXPECT_EQ(ParseDuration("500ms").value().count(), 500);
  EXPECT_EQ(ParseDuration("1.5m").value().count(), 90000);
  EXPECT_EQ(ParseDuration("2").value().count(), 2000);
  EXPECT_EQ(ParseDuration("0").value().count(), 0);
  for (const char* bad : {"", "s", "-1s", "3 s", "1d", "1e3", "nan", "inf", "99999999h"})
    EXPECT_FALSE(ParseDuration(bad).ok()) << bad;
}

TEST(ValuesTest, SizesArePowersOfTwoOrTen) {
  EXPECT_EQ(ParseSize("8GiB").value(), std::int64_t{8} << 30);
  EXPECT_EQ(ParseSize("12MiB").value(), 12 << 20);
  EXPECT_EQ(ParseSize("1GB").value(), 1000000000);
  EXPECT_EQ(ParseSize("4096").value(), 4096);
  EXPECT_EQ(ParseSize("1TiB").value(), std::int64_t{1} << 40);
  for (const char* bad : {"", "GiB", "-1", "1gib", "1 GiB", "9999999999TiB"}) EXPECT_FALSE(ParseSize(bad).ok()) << bad;
}

TEST(ValuesTest, CountsArePositiveAndBounded) {
  EXPECT_THAT(ParseCounts("7,1,64", 100).value(), ElementsAre(7, 1, 64));
  for (const char* bad : {"", "0", "-1", "1,", ",1", "1,x", "101", "1.5", "99999999999999999999"})
    EXPECT_FALSE(ParseCounts(bad, 100).ok()) << bad;
}

TEST(ValuesTest, FractionsAreShares) {
  EXPECT_THAT(ParseFractions("0.01,1,1e-9,.5").value(), ElementsAre(0.01, 1, 1e-9, 0.5));
  EXPECT_EQ(ParseFraction("0").value(), 0);
  for (const char* bad : {"", "-0.1", "1.01", "nan", "inf", "0x1", "1%", "1e", "1e-9999"})
    EXPECT_FALSE(ParseFraction(bad).ok()) << bad;
  EXPECT_THAT(ParseFractions("0.5,0").status().message(), HasSubstr("'0' is not a number above 0"));
}

TEST(ValuesTest, ModesAreKnownAndNamedOnce) {
  EXPECT_THAT(ParseModes("off,exact").value(), ElementsAre(ReuseMode::kOff, ReuseMode::kExact));
  for (const char* bad : {"", "of", "off,off", "off,"}) EXPECT_FALSE(ParseModes(bad).ok()) << bad;
}

TEST(NpyTest, HeaderIsAlignedAndNamesTheShape) {
  for (const std::int64_t rows : {1, 331, 123456789}) {
    const std::string header = NpyHeader(rows, 49152);
    EXPECT_EQ(header.size() % 64, 0u);
    EXPECT_EQ(header.substr(0, 8), std::string("\x93NUMPY\x01\x00", 8));
    const std::size_t length = static_cast<unsigned char>(header[8]) + 256u * static_cast<unsigned char>(header[9]);
    EXPECT_EQ(10 + length, header.size());
    EXPECT_EQ(header.back(), '\n');
    EXPECT_THAT(header, HasSubstr("'shape': (" + std::to_string(rows) + ", 49152), }"));
  }
}

TEST(SummaryTest, PercentilesInterpolateAsNumpyDoes) {
  const std::vector<double> ten = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  EXPECT_DOUBLE_EQ(trace::Percentile(ten, 0), 1);
  EXPECT_DOUBLE_EQ(trace::Percentile(ten, 0.5), 5.5);
  EXPECT_DOUBLE_EQ(trace::Percentile(ten, 0.95), 9.55);
  EXPECT_DOUBLE_EQ(trace::Percentile(ten, 1), 10);
  EXPECT_DOUBLE_EQ(trace::Percentile({7}, 0.99), 7);
  EXPECT_DOUBLE_EQ(trace::Percentile({}, 0.5), 0);
  const trace::Summary summary = trace::Summarise({3, 1, 2});
  EXPECT_DOUBLE_EQ(summary.mean, 2);
  EXPECT_DOUBLE_EQ(summary.p50, 2);
  EXPECT_DOUBLE_EQ(trace::Summarise({}).mean, 0);
}

TEST(SuggestTest, FindsTheNearestNameOrNone) {
  const std::vector<std::string> names = {"--model", "--messages", "--out"};
  EXPECT_EQ(Nearest("--modle", names), "--model");
  EXPECT_EQ(Nearest("--mesages", names), "--messages");
  EXPECT_EQ(Nearest("--temperature", names), "");
  EXPECT_EQ(Nearest("", names), "");
  EXPECT_EQ(Nearest(std::string(10000, 'x'), names), "");
}

TEST(FilesTest, IdsAreStrict) {
  EXPECT_THAT(ParseIds(R"({"ids":[0,5,2147483647]})", false).value(), ElementsAre(0, 5, 2147483647));
  EXPECT_TRUE(ParseIds(R"({"ids":[]})", true).value().empty());
  for (const char* bad :
       {R"({"ids":[]})", R"({"ids":[-1]})", R"({"ids":[2147483648]})", R"({"ids":"x"})", "{}", "[1]", "{", "",
        R"({"ids":[1.5]})", R"({"ids":[true]})", R"({"ids":["1"]})", R"({"ids":[[1]]})", R"({"ids":[1e3]})"}) {
    EXPECT_FALSE(ParseIds(bad, false).ok()) << bad;
  }
  EXPECT_TRUE(CheckIds({0, 9}, 10).ok());
  EXPECT_THAT(CheckIds({0, 10}, 10).message(), HasSubstr("token id 10"));
}

TEST(FilesTest, DeepJsonIsRefused) {
  const std::string deep(100000, '[');
  EXPECT_THAT(ParseTextLine(deep).status().message(), HasSubstr("nested"));
}

TEST(FilesTest, MessagesAreAListWithRoles) {
  const std::string path = std::filesystem::temp_directory_path() / ("kvshare-messages-" + std::to_string(::getpid()));
  const auto read = [&](const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
    return ReadMessages(path);
  };
  EXPECT_TRUE(read(R"([{"role":"user","content":"x"}])").ok());
  EXPECT_EQ(read(R"({"messages":[{"role":"user"}]})").value(), R"([{"role":"user"}])");
  for (const char* bad :
       {"[]", R"({"messages":[]})", "{", "{}", "[1]", R"([{"content":"x"}])", R"([{"role":1}])", R"("user")"}) {
    const auto messages = read(bad);
    ASSERT_FALSE(messages.ok()) << bad;
    EXPECT_THAT(messages.status().message(), HasSubstr(path));
  }
  std::filesystem::remove(path);
  EXPECT_EQ(ReadMessages(path).status().code(), StatusCode::kNotFound);
}

}  // namespace
}  // namespace kvshare::kvctl
