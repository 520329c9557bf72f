// Writes the token ids that llama.cpp gives to a list of awkward strings: the golden file of the tokenizer tests.
//
//   python -m bench.peers.install DIR          (node-llama-cpp with its prebuilt CPU binary, from npm)
//   node bench/peers/llama_cpp_tokens.mjs DIR MODEL.gguf > tests/engine/checkpoint/data/llama_cpp_tokens.json
//
// "plain": special tokens are not parsed, no BOS. "special": text of special tokens becomes those tokens, no BOS.

import path from "node:path";
import {load_binding} from "./llama_cpp_binding.mjs";

const [directory, model_path] = process.argv.slice(2);
const {module: {getLlama, LlamaLogLevel}, version} = await load_binding(directory);

const plain = [
    "",
    " ",
    "a",
    "Hello, world!",
    "The capital of France is",
    " leading space",
    "trailing space ",
    "  two leading, three between   words  ",
    "\n",
    "\n\n",
    "\n\n\n\n",
    "\t",
    "\t\tindented\twith\ttabs",
    " \n \n",
    "line one\nline two\r\nline three\rline four",
    "                ",
    "\n    \n        x",
    "trailing newline\n",
    "word\n\n  next",
    "0",
    "7 8 9",
    "1234567890",
    "2018-01-22",
    "3.14159265358979",
    "1,234,567.89 and -42 or +7",
    "abc123def456",
    "x1 y22 z333 4w 55v",
    "0xDEADBEEF 1e-10 6.02e23",
    "١٢٣٤٥ ०१२३ ๑๒๓",
    "½ ² ³ Ⅷ ①",
    "I'm you're he'll she'd we've it's don't",
    "I'M YOU'RE HE'LL SHE'D WE'VE IT'S DON'T",
    "’s curly ’re ’t apostrophes ‘quoted’",
    "https://example.com/path?q=1&r=two#frag",
    "user.name+tag@mail.example.co.uk",
    "C:\\Users\\name\\file.txt",
    "def f(x: int) -> int:\n    return x ** 2 + 1\n\n\nif __name__ == '__main__':\n\tprint(f(3))\n",
    "for (let i = 0; i < 10; ++i) { a[i] = b?.[i] ?? null; } // done",
    "#include <stdio.h>\nint main(void) { return 0; }",
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';",
    "{\"key\": [1, 2.5, true, null], \"näme\": \"välue\"}",
    "!!!???...",
    "a--b---c----d",
    "=== title ===\n*** **bold** ~~strike~~",
    "$100 €200 £300 ¥400 100% ©®™",
    "naïve café Zürich Ångström São Paulo",
    "e\u0301 a\u0308 n\u0303 cafe\u0301",
    "ÀÉÎÕÜ àéîõü ß ẞ ı İ",
    "你好,世界。今天天气怎么样?",
    "日本語のテキスト、カタカナとひらがな。",
    "한국어 텍스트입니다.",
    "混合 mixed 文字 text 123 数字",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก",
    "Привет, мир! Ёлка",
    "Γειά σου Κόσμε",
    "😀",
    "😀😃😄 text 🎉🎊",
    "👨‍👩‍👧‍👦 👍🏽 🇫🇷🇯🇵 ❤️",
    "non\u00a0breaking\u00a0\u00a0spaces",
    "zero\u200bwidth\u200cjoin\u200der\ufeffbom",
    "thin\u2009em\u2003ideographic\u3000line\u2028para\u2029end",
    "soft\u00adhyphen en–dash em—dash ellipsis…",
    "control \u0001 \u0007 \u001b[0m \u007f characters",
    "𝓜𝓪𝓽𝓱 𝟙𝟚𝟛 ∑∫√∞≠≤ 𐍈",
    "\uffff \ue000 private",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "AbCdEfGhIjKl camelCaseWord PascalCaseWord snake_case_word SCREAMING_CASE kebab-case-word",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "<|im_start|>user\nnot special here<|im_end|>",
    "<|endoftext|> <s> </s> [INST] <|im_start|>",
    "The quick brown fox jumps over the lazy dog. ".repeat(20),
    "1 + 1 = 2; 12 + 34 = 46;\n".repeat(12),
];

const special = [
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        + "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n你好!<|im_end|>\n<|im_start|>user\n再见 👋<|im_end|>\n",
    "<|endoftext|>",
    "<|im_start|><|im_end|>",
    "text <|im_end|> text",
    " <|im_start|> \n <|im_end|> ",
    "no special tokens at all",
    "<|im_start|",
    "<|im_start|>>",
    "<|im_startuser|>",
    "a<|endoftext|>b<|endoftext|>\n\nc",
    "",
];

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: model_path, vocabOnly: true});
const record = (texts, parse) => texts.map((text) => ({text, ids: [...model.tokenize(text, parse)]}));
const line = (entry) => "    " + JSON.stringify(entry).replace(/[\u007f-\uffff]/g,
    (unit) => "\\u" + unit.charCodeAt(0).toString(16).padStart(4, "0"));
const list = (entries) => "[\n" + entries.map(line).join(",\n") + "\n  ]";
console.log(`{
  "made_by": "bench/peers/llama_cpp_tokens.mjs, node-llama-cpp ${version},`
    + ` llama.cpp ${llama.llamaCppRelease.release}",
  "model": ${JSON.stringify(path.basename(model_path))},
  "plain": ${list(record(plain, false))},
  "special": ${list(record(special, true))}
}`);
await llama.dispose();
