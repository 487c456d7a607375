// Whether a prompt is computed over what was found: by what its rows cost, and not by how many they are.
#include "agentd/engine/moved_reuse.h"

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/agentd/service_harness.h"
#include "tests/agentd/tiny_service.h"
#include "tests/testing/ids.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::agentd {
namespace {

using Ids = std::vector<TokenId>;
using testing::Join;
using testing::RandomIds;

class MovedReuseTest : public ::testing::Test {
 protected:
  void SetUp() override {
    model_ = testing::LoadTinyModel(kernels::DType::kF32);
    ASSERT_NE(model_, nullptr);
    reuse_ =
        std::make_unique<MovedReuse>(model_.get(), &pool_, kernels::KvPages{.layout = model_->kv_layout()}, &names_,
                                     MovedReuseOptions{}, [](const std::function<void()>& task) { task(); });
    planner_ = Join({Role(30), note_, RandomIds(rng_, 20)});
    Store(planner_);
    request_.prompt = Join({Role(45), note_, RandomIds(rng_, 25)});
    request_.session = session_;
    request_.reuse = ReuseMode::kAuto;
  }

  // First words of so many tokens.
  Ids Role(int tokens) { return testing::TinyRole(rng_, tokens); }

  void Store(const Ids& prompt) {
    Result<KvHandle> kv = pool_.Acquire({}, static_cast<std::int64_t>(prompt.size()));
    KVS_ASSERT_OK(kv);
    pool_.Extend(*kv, static_cast<std::int64_t>(prompt.size()));
    pool_.Retire(std::move(*kv), prompt, 0);
    reuse_->Record(*session_, prompt, 0);
  }

  // The request's prompt over the note.
  MovedWork Work() {
    FoundChunks found = reuse_->Find(request_, 0, 1, nullptr, nullptr);
    EXPECT_EQ(found.chunks.size(), 1u);
    if (found.chunks.empty()) return {};
    return reuse_->Prepare(request_, {}, found, 0);
  }

  std::mt19937 rng_{11};
  const Ids note_ = RandomIds(rng_, 400);
  const std::shared_ptr<const std::string> session_ = std::make_shared<const std::string>("s");
  std::unique_ptr<runtime::Model> model_;
  KvPool pool_{32, RootContext(Digest{}, Digest{})};
  StatsBook names_;
  std::unique_ptr<MovedReuse> reuse_;
  Ids planner_;
  EngineRequest request_;
};

// A document in front is not the reader's first words, however long it is: what was computed behind another one is not
// taken for one thread.
TEST_F(MovedReuseTest, AnotherDocumentInFrontIsOtherCompany) {
  const Ids document = RandomIds(rng_, 150), note = RandomIds(rng_, 300), plain = RandomIds(rng_, 300);
  Store(Join({Role(40), document, note, RandomIds(rng_, 20)}));
  Store(Join({Role(200), plain, RandomIds(rng_, 20)}));
  enum Use { kInCompany, kElsewhere, kComputed };
  const auto use = [&](int role, const Ids& in_front, const Ids& read) {
    request_.prompt = Join({Role(role), in_front, read, RandomIds(rng_, 60)});
    const FoundChunks found = reuse_->Find(request_, 0, 1, nullptr, nullptr);
    EXPECT_GE(found.chunks.size() + found.strays.size(), 1u);
    if (found.chunks.empty()) return kComputed;
    return found.chunks.back().chunk.in_company ? kInCompany : kElsewhere;
  };
  EXPECT_EQ(use(50, document, note), kInCompany);
  EXPECT_EQ(use(50, RandomIds(rng_, 150), note), kComputed) << "it has read what stands nowhere here";
  EXPECT_EQ(use(190, {}, note), kComputed) << "a role as long as role and document were";
  EXPECT_EQ(use(190, {}, plain), kInCompany);
  EXPECT_EQ(use(40, RandomIds(rng_, 150), plain), kElsewhere) << "role and document as long as a role was";
}

// Nor is a message that ends as a role does but is a user's.
TEST_F(MovedReuseTest, AUsersMessageInFrontIsNoRole) {
  const Ids note = RandomIds(rng_, 300);
  const auto message = [&](TokenId first) {
    return Join({{testing::kTinyImStart, first}, RandomIds(rng_, 150), {testing::kTinyImEnd}});
  };
  const auto found_behind = [&](TokenId first) {
    request_.prompt = Join({message(first), note, RandomIds(rng_, 60)});
    FoundChunks found = reuse_->Find(request_, 0, 1, nullptr, nullptr);
    EXPECT_EQ(found.chunks.size() + found.strays.size(), 1u);
    return found;
  };
  Store(Join({message('u'), note, RandomIds(rng_, 20)}));
  EXPECT_EQ(found_behind('u').strays.size(), 1u) << "it has read a document that stands nowhere here";
  Store(Join({message('s'), note, RandomIds(rng_, 20)}));
  const FoundChunks found = found_behind('s');
  ASSERT_EQ(found.chunks.size(), 1u);
  EXPECT_TRUE(found.chunks[0].chunk.in_company);
}

TEST_F(MovedReuseTest, WhatRowsCostDecidesWhereThePolicyMayChoose) {
  const MovedWork work = Work();
  ASSERT_NE(work.prompt, nullptr);
  ASSERT_TRUE(work.prompt->OneThread());
  const auto plain = static_cast<std::int64_t>(request_.prompt.size());
  const auto computed = static_cast<double>(work.prompt->RowsToCompute());
  const double sent_back = kThreadPrior.doubts * static_cast<double>(plain);
  const double even = (static_cast<double>(plain) - sent_back) / computed;
  ASSERT_GT(even, 1);

  const MovedReuse::Decision cheap = reuse_->Decide(request_, *work.prompt, plain, even * 0.99);
  EXPECT_TRUE(cheap.use);
  EXPECT_NEAR(cheap.rows, even * 0.99 * computed + sent_back, 1e-9);
  const MovedReuse::Decision dear = reuse_->Decide(request_, *work.prompt, plain, even * 1.01);
  EXPECT_FALSE(dear.use);
  EXPECT_TRUE(dear.distrusted) << "it would pay if none were sent back";
  const double dearer_than_all = static_cast<double>(plain) / computed * 1.01;
  EXPECT_FALSE(reuse_->Decide(request_, *work.prompt, plain, dearer_than_all).use);
  EXPECT_FALSE(reuse_->Decide(request_, *work.prompt, plain, dearer_than_all).distrusted);

  // Who asks for a policy by name gets it wherever it computes less.
  request_.reuse = ReuseMode::kRotate;
  const MovedWork rotate = Work();
  ASSERT_NE(rotate.prompt, nullptr);
  EXPECT_TRUE(reuse_->Decide(request_, *rotate.prompt, plain, dearer_than_all).use);
  EXPECT_FALSE(reuse_->Decide(request_, *rotate.prompt, rotate.prompt->RowsToCompute(), 1).use);
}

// The daemon measures it, with the first prompt that has moved chunks; where what computing costs is given, it is not
// looked at.
TEST_F(MovedReuseTest, WhatARowCostsIsMeasured) {
  std::unique_ptr<runtime::Model> model = testing::LoadTinyModel(kernels::DType::kF32);
  ASSERT_NE(model, nullptr);
  const auto pool_bytes = static_cast<std::int64_t>(model->kv_layout().page_bytes()) * 100;
  const auto measuring = NewService(std::move(model), {.kv_pool_bytes = pool_bytes});
  KVS_ASSERT_OK(measuring);
  const auto given = testing::NewTinyService(kernels::DType::kF32);
  ASSERT_NE(given, nullptr);
  for (Service* const service : {measuring->get(), given.get()}) {
    const auto ask = [service](const Ids& prompt) {
      GenerateRequest request = testing::IdsRequest(prompt, 8, "agent");
      request.session = "s";
      request.reuse = ReuseMode::kAuto;
      request.ignore_eos = true;  // the last token comes after the price is told
      testing::Ask(*service, request);
      return service->GetStats().approximate.moved_row;
    };
    EXPECT_EQ(ask(planner_), 1) << "nothing is moved yet";
    EXPECT_EQ(ask(request_.prompt) != 1, service == measuring->get());
  }
}

// A price from a bad moment would keep everybody from finding out that it is wrong. So what does not seem to pay is
// tried when 1 % of the rows that were computed without is as much.
TEST_F(MovedReuseTest, WhatSeemsTooDearIsTriedNowAndThen) {
  const MovedWork work = Work();
  ASSERT_NE(work.prompt, nullptr);
  const auto plain = static_cast<std::int64_t>(request_.prompt.size());
  const double price = 1.5 * static_cast<double>(plain) / static_cast<double>(work.prompt->RowsToCompute());
  int trials = 0;
  constexpr int kRequests = 1000;
  for (int i = 0; i < kRequests; ++i) {
    const MovedReuse::Decision decision = reuse_->Decide(request_, *work.prompt, plain, price);
    trials += decision.use;
    reuse_->Admitted(decision.trial_rows);
  }
  // Each costs 1.5 prompts and a request earns 0.01.
  EXPECT_NEAR(trials, kRequests * 0.01 / 1.5, 1);
}

}  // namespace
}  // namespace kvshare::agentd
