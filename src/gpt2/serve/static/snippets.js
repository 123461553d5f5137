// A request as a command or script. It reads the API key from the environment.

import { hasKey } from "./api.js";
import { badWordsOf } from "./request.js";

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const CLI_NAMES = { max_tokens: "max-new-tokens" };
// parameters of the OpenAI client
const OPENAI = ["model", "prompt", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias"];

export function asCurl({ request }, base) {
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $GPT2_API_KEY"` : "";
  const body = quoted(JSON.stringify(request));
  return `curl ${quoted(`${base}v1/completions`)}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${body}`;
}

export function asPython({ request }, base) {
  const entries = Object.entries(request);
  const lines = entries.filter(([name]) => OPENAI.includes(name)).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  const extra = Object.fromEntries(entries.filter(([name]) => !OPENAI.includes(name)));
  const key = hasKey() ? `os.environ["GPT2_API_KEY"]` : `"none"`;
  return `${hasKey() ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${base}v1", api_key=${key})
answer = client.completions.create(
${lines.join("\n")}
    extra_body=${JSON.stringify(extra)},
)
print(answer.choices[0].text)`;
}

// info: of the model, whose reference `gpt2 sample` can load.
export function asCommand({ request, text }, settings, { reference }) {
  const { model, prompt, stop = [], bad_words, logit_bias = {}, ...numbers } = request;
  const flags = Object.entries(numbers).map(([name, value]) => `--${CLI_NAMES[name] ?? name.replaceAll("_", "-")}=${value}`);
  flags.push(...Object.entries(logit_bias).map(([id, bias]) => `--logit-bias=${id}=${bias}`));
  flags.push(...badWordsOf(settings).map((word) => `--bad-word=${quoted(word)}`));
  flags.push(...stop.map((each) => `--stop=${quoted(each)}`));
  const note = typeof prompt === "string" ? "" : "# gpt2 sample takes text: its tokens may differ from those of the page\n";
  return `${note}gpt2 sample ${quoted(reference)} --prompt=${quoted(text)} \\\n  ${flags.join(" \\\n  ")}`;
}
