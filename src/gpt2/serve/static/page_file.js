// An export as one HTML file that needs nothing else: text, probabilities, alternatives, and attention.

import { SHADES } from "./picture.js";

const STYLE = `
:root { color-scheme: light dark; --paper: #faf8f5; --sheet: #fff; --ink: #22201d; --soft: #68625a; --line: #e6e0d8; --accent: #a8441c; --tint: 16 85% 52%; --attention: 214 85% 50%; }
@media (prefers-color-scheme: dark) { :root { --paper: #171513; --sheet: #1f1c1a; --ink: #ece7df; --soft: #a89f94; --line: #37322d; --accent: #f0986a; --tint: 18 80% 55%; --attention: 212 85% 62%; } }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem 14rem; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 17px; } p { color: var(--soft); }
#text { padding: 24px 28px; border: 1px solid var(--line); border-radius: 14px; background: var(--sheet); font: 19px/1.75 Charter, Georgia, serif; white-space: pre-wrap; overflow-wrap: anywhere; }
#text span { border-radius: 3px; background: hsl(var(--tint) / var(--shade, 0)); cursor: pointer; }
#text .model { text-decoration: underline dotted var(--soft) 1px; text-underline-offset: 5px; }
#text.attending span { background: hsl(var(--attention) / calc(var(--weight, 0) * 0.55)); }
#text .here { outline: 2px solid var(--accent); }
#card { position: fixed; inset: auto 0 0; max-height: 13rem; overflow: auto; padding: 12px 20px; border-top: 1px solid var(--line); background: var(--sheet); }
#card ol { columns: 2; margin: 6px 0; } #card b { white-space: pre; font-family: Charter, Georgia, serif; }
select { font: inherit; } i { display: inline-block; width: 16px; height: 10px; background: hsl(var(--tint) / var(--shade)); }`;

// Runs in the file. Left and right move from token to token.
const SCRIPT = `
const data = JSON.parse(document.getElementById("data").textContent), text = document.getElementById("text"), card = document.getElementById("card"), select = document.getElementById("head");
const spans = [...text.children], percent = (p) => (100 * p).toFixed(p < 0.01 ? 2 : 1) + " %";
let at = 0;
function show(i) {
  if (!spans[i]) return;
  spans[at].classList.remove("here");
  at = i;
  spans[at].classList.add("here");
  spans[at].scrollIntoView({ block: "nearest" });
  const token = data.tokens[i], list = document.createElement("ol"), title = document.createElement("div"), word = document.createElement("b");
  word.textContent = token.text || token.bytes;
  title.append(word, ", token " + token.id + (token.probability === null ? ", first token" : ", " + percent(token.probability) + ", rank " + token.rank) + (token.by === "you" ? ", written" : ", by the model"));
  for (const other of token.alternatives) {
    const item = document.createElement("li"), name = document.createElement("b");
    name.textContent = other.text;
    item.append(name, " " + percent(other.probability));
    list.append(item);
  }
  card.replaceChildren(title, list);
  const head = data.heads[select.value];
  text.classList.toggle("attending", head !== undefined);
  if (!head) return;
  const row = head.weights[i + head.first], most = Math.max(...row.slice(1), 1e-9);
  spans.forEach((span, s) => span.style.setProperty("--weight", Math.min(1, (row[s + head.first] ?? 0) / most)));
}
text.addEventListener("click", ({ target }) => show(spans.indexOf(target)));
text.addEventListener("pointerover", ({ target }) => show(spans.indexOf(target)));
text.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  show(at + step);
});
select.addEventListener("change", () => show(at));
show(0);`;

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");

export function asPage(data) {
  const spans = data.tokens.map(({ text, by, probability }) => `<span class="${by}" style="--shade: ${shadeOf(probability)}">${escaped(text)}</span>`);
  const heads = data.heads.map(({ layer, head }, i) => `<option value="${i}">Attention: layer ${layer}, head ${head}</option>`);
  const scale = SHADES.map((shade) => `<i style="--shade: ${shade}"></i>`).join("");
  const settings = `temperature ${data.settings.temperature}, top-k ${data.settings.top_k}, top-p ${data.settings.top_p}`;
  const perplexity = data.perplexity === null ? "" : `, perplexity ${data.perplexity.toPrecision(3)}`;
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escaped(data.text.slice(0, 60))} – ${escaped(data.model)}</title>
<style>${STYLE}</style>
<h1>${escaped(data.model)}</h1>
<p>${escaped(settings)}; ${data.tokens.length} tokens${perplexity}. Underlined tokens are the model's. <span aria-hidden="true">${scale}</span> likely to unlikely. Point at a token, or use the arrow keys.</p>
<p><label>Colors: <select id="head"><option value="">Probability</option>${heads.join("")}</select></label></p>
<div id="text" tabindex="0" role="group" aria-label="Text">${spans.join("")}</div>
<div id="card" role="status"></div>
<script type="application/json" id="data">${JSON.stringify(data).replaceAll("<", "\\u003c")}</script>
<script>${SCRIPT}</script>
</html>
`;
}

const shadeOf = (probability) => (probability === null ? 0 : SHADES[Math.max(0, Math.min(5, Math.floor(-Math.log2(Math.max(probability, 1e-30)) / 2)))]);
