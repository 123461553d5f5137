// The question mark of each panel: a sentence and a formula.

import { $, el } from "./dom.js";
import { onRender, state } from "./state.js";

const HELP = {
  settings: [
    ["The model gives every token a logit; divided by the temperature T and normalized, they are the probabilities from which the next token is drawn.", "p(i) = exp(zᵢ / T) / Σⱼ exp(zⱼ / T)"],
  ],
  attention: [
    ["At each position a head mixes the values of the positions up to it, weighted by how well its query fits their keys.", "A = softmax(Q Kᵀ / √d), causal;  output = A V"],
    ["Kinds of heads: the mean weight on the token before, on the same token earlier, and on the token after that, in random tokens that are repeated.", "induction: mean of A[t, t − n + 1] over the second n of 2n tokens"],
  ],
  layers: [
    ["The logit lens reads the residual stream after each layer as if it were the last one.", "pₗ = softmax(W_U · LayerNorm(xₗ))"],
  ],
  contributions: [
    ["The residual stream is a sum of outputs, and with the scale of the last layer norm fixed the logit is a sum too: a term for each head and MLP (direct logit attribution).", "z(a) − z(b) = Σ (w(a) − w(b)) · γ (oᵢ − mean oᵢ) / σ + bias"],
  ],
  whatif: [
    ["Switch off: the output of a head or MLP is replaced by zeros, or by its mean over the text.", "xₗ₊₁ = xₗ + Σ heads kept + MLP"],
    ["Patch: one activation of the text is replaced by that of another text; the effect is 1 where that alone gives the other answer.", "effect = (Δ patched − Δ text) / (Δ other − Δ text),  Δ = z(a) − z(b)"],
    ["Steer: the difference of two prompts is added to the residual stream.", "xₗ ← xₗ + strength · (xₗ(towards) − xₗ(away))"],
  ],
  tokens: [
    ["The model sees tokens, not letters. Perplexity is the number of equally likely tokens with the same uncertainty.", "perplexity = exp(−mean ln p(token | tokens before))"],
  ],
  tree: [["Every continuation is kept as a branch of its text.", "p(text) = Π p(token | tokens before)"]],
  chat: [["The chat template of the model makes one text of the turns, and the model continues it.", "answer ~ p(token | template(turns))"]],
};

let isOpen = false;

function draw() {
  $("help-text").hidden = !isOpen;
  $("help").setAttribute("aria-expanded", String(isOpen));
  if (!isOpen) return;
  $("help-text").replaceChildren(...HELP[state.tab].flatMap(([sentence, formula]) => [el("p", {}, sentence), el("p", { className: "formula" }, formula)]));
}

export function wireHelp() {
  onRender(draw);
  $("help").addEventListener("click", () => {
    isOpen = !isOpen;
    draw();
  });
}
