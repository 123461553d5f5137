// The dialogs for history and sharing.

import { $, el } from "./dom.js";
import { readableRequest } from "./request.js";
import { asCommand, asCurl, asPython } from "./snippets.js";
import { asJson, copy, download, clearHistory, history, toFragment } from "./share.js";
import { path, state } from "./state.js";
import { serialize, textOf } from "./tree.js";

export function wireDialogs(take) {
  $("open-history").addEventListener("click", () => {
    drawHistory(take);
    $("history").showModal();
  });
  $("forget").addEventListener("click", () => {
    clearHistory();
    drawHistory(take);
  });
  $("open-share").addEventListener("click", () => {
    drawShareOptions();
    $("share").showModal();
  });
  for (const button of document.querySelectorAll("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
}

function drawHistory(take) {
  const entries = history();
  const none = el("li", { className: "quiet" }, "Nothing yet.");
  $("entries").replaceChildren(...(entries.length ? entries.map((entry) => historyItem(entry, take)) : [none]));
  $("forget").hidden = !entries.length;
}

function historyItem(entry, take) {
  const words = entry.path.map((item) => (Array.isArray(item) ? item[0] : item)).join("").replace(/\s+/g, " ").trim();
  const when = new Date(entry.at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  const button = el("button", { type: "button" }, el("span", {}, words.slice(0, 140)), el("small", {}, `${entry.model}, ${when}`));
  button.addEventListener("click", () => {
    $("history").close();
    take(entry);
  });
  return el("li", {}, button);
}

const sharedState = () => ({ path: serialize(path()), ...state.sides.A, ...(state.comparing && { b: state.sides.B }) });

const COPIES = {
  "Copy link": async (base) => `${base}${toFragment(sharedState())}`,
  "Copy as curl": async (base) => asCurl(await readableRequest(state.sides.A), base),
  "Copy as Python": async (base) => asPython(await readableRequest(state.sides.A), base),
  "Copy as command line": async () => asCommand(await readableRequest(state.sides.A), state.sides.A.settings),
};

function drawShareOptions() {
  const base = new URL(".", location.href).href;
  const copies = Object.entries(COPIES).map(([name, make]) => shareButton(name, () => copyAndPreview(() => make(base))));
  const asText = shareButton("Save as text", () => download("gpt2.txt", "text/plain", textOf(path())));
  const asFile = shareButton("Save as JSON", () => download("gpt2.json", "application/json", asJson(path(), state.sides.A)));
  $("choices").replaceChildren(...copies, asText, asFile);
  $("preview").hidden = true;
  $("copied").textContent = "";
}

function shareButton(name, act) {
  const button = el("button", { type: "button" }, name);
  button.addEventListener("click", act);
  return button;
}

async function copyAndPreview(make) {
  try {
    const text = await make();
    $("preview").textContent = text;
    $("preview").hidden = false;
    $("copied").textContent = (await copy(text)) ? "Copied." : "The browser does not allow copying: select the text above.";
  } catch (error) {
    $("copied").textContent = error.message;
  }
}
