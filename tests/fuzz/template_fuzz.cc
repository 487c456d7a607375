// A template of any bytes and, after a zero byte, the messages to render with it.
#include <cstdlib>

#include "runtime/chat_template.h"
#include "runtime/utf8.h"
#include "tests/fuzz/seeded.h"

namespace kvshare {
namespace {

std::vector<std::string> Seeds() {
  return {
      "{%- for m in messages if m.role != 'x' -%}{{ loop.index }}{{ m['content'] | trim }}{% else %}none{% endfor %}",
      "{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a * 2 %}{% endfor %}{{ ns.a }}{{ messages "
      "| tojson(indent=2) }}",
      "{% macro f(a, b=2) %}{{ a ~ b }}{% endmacro %}{{ f(1) }}{{ f(b='q', a=[1, 2][::-1]) }}{% raw %}{{ x }}{% endraw "
      "%}",
      "{% set x | upper %}abc{% endset %}{{ x[1:] }}{{ x.split('B') | join(', ') }}{{ {'k': 1.5} | dictsort }}{# "
      "comment #}",
      "{% if messages | selectattr('role', 'equalto', 'user') | list | length > 0 and bos_token is defined %}y{% elif "
      "x %}n{% endif %}",
      "{{ raise_exception('no') }}\0[{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"t\"}]}]",
      "{% filter replace('a', 'b') %}{% generation %}a{% endgeneration %}{% endfilter %}{{ 'x' * 3 ~ -7 // 2 ~ 2 ** 8 "
      "}}",
      "{{ 'a b'.title() }}{{ 'xay'.replace('a', '') }}{{ ' q '.strip() }}{{ [3, 1] | sort | first }}{{ [1, 1] | unique "
      "| list }}",
  };
}

}  // namespace
}  // namespace kvshare

KVS_FUZZ_SEEDS(kvshare::Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kvshare;
  const std::string input(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = input.find('\0');
  const auto chat = runtime::NewChatTemplate(input.substr(0, zero), {.bos = "<s>", .eos = "</s>"});
  if (!chat.ok()) return 0;
  const std::string messages =
      zero == std::string::npos
          ? R"([{"role": "user", "content": "Hi \u00e9"}, {"role": "assistant", "content": "yo"}])"
          : input.substr(zero + 1);
  const auto text = (*chat)->Render(messages, R"([{"name": "t", "n": [1, 2.5, null, true]}])", true);
  if (text.ok() && !runtime::IsValidUtf8(*text)) std::abort();
  return 0;
}
