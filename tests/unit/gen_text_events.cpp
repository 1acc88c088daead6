// The text of several requests that come and go: whole code points, stop texts, ends.
#include <gtest/gtest.h>

#include "gen/text_events.h"
#include "tiny_tokenizer.h"

namespace {

using namespace mlxlm;
using engine::Event;
using engine::Finish;

class TextEvents : public testing::Test {
 protected:
  static const text::Tokenizer& tokenizer() {
    static const text::Tokenizer shared = tests::byte_tokenizer();
    return shared;
  }
  gen::TextEvents::Piece token(int64_t id, int token, Finish finish = Finish::none) {
    Event e;
    e.id = id;
    e.chosen = engine::ChosenToken{.token = token};
    e.finish = finish;
    return texts.take(e);
  }
  gen::TextEvents::Piece ended(int64_t id, Finish finish) {
    Event e;
    e.id = id;
    e.finish = finish;
    return texts.take(e);
  }
  gen::TextEvents texts{tokenizer()};
};

TEST_F(TextEvents, EachRequestHasItsOwnText) {
  texts.begin(1, {});
  EXPECT_EQ(token(1, 'a').text, "a");
  texts.begin(2, {"xy"});
  EXPECT_EQ(token(2, 'x').text, "");   // may be the stop text
  EXPECT_EQ(token(1, 0xC3).text, "");  // half a code point
  EXPECT_EQ(token(2, 'z').text, "xz");
  EXPECT_EQ(token(1, 0xA9).text, "\xC3\xA9");
  EXPECT_EQ(token(2, 'x').text, "");
  const auto stop = token(2, 'y');
  EXPECT_TRUE(stop.stopped);
  EXPECT_EQ(stop.text, "");
  EXPECT_EQ(token(2, 'q').text, "");  // it has ended
  EXPECT_EQ(token(1, 'b', Finish::length).text, "b");
  EXPECT_EQ(token(1, 'c').text, "");
  EXPECT_EQ(token(3, 'c').text, "");  // nobody
}

TEST_F(TextEvents, AnEndBringsWhatWasHeldBack) {
  for (const auto finish : {Finish::length, Finish::cancelled, Finish::failed}) {
    texts.begin(4, {"xyz"});
    token(4, 'x');
    const auto last = finish == Finish::length ? token(4, 'y', finish) : ended(4, finish);
    EXPECT_EQ(last.text, finish == Finish::length ? "xy" : "x");
    EXPECT_FALSE(last.stopped);
  }
  texts.begin(5, {"x"});
  token(5, 'a');
  EXPECT_EQ(token(5, 'b', Finish::stop).text, "");  // the token that the engine stopped at
  texts.begin(6, {"x"});
  EXPECT_TRUE(token(6, 'x', Finish::length).stopped);
  texts.begin(7, {});
  texts.end(7);
  EXPECT_EQ(token(7, 'a').text, "");
}

}  // namespace
