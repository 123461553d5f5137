// The two dialogs: what was written before, and ways to take a text away.

import { $, el } from "./dom.js";
import { asCommand, asCurl, asJson, asPython, copy, download, forgetHistory, history, toFragment } from "./share.js";
import { textOf } from "./tree.js";

export function wireShare(page) {
  $("open-history").addEventListener("click", () => {
    drawHistory(page);
    $("history").showModal();
  });
  $("forget").addEventListener("click", () => {
    forgetHistory();
    drawHistory(page);
  });
  $("open-share").addEventListener("click", () => {
    drawChoices(page);
    $("share").showModal();
  });
  for (const button of document.querySelectorAll("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
}

function drawHistory(page) {
  const entries = history();
  const none = el("li", { className: "quiet" }, "Nothing yet.");
  $("entries").replaceChildren(...(entries.length ? entries.map((entry) => entryOf(entry, page)) : [none]));
  $("forget").hidden = !entries.length;
}

function entryOf(entry, page) {
  const words = entry.path.map((item) => (Array.isArray(item) ? item[0] : item)).join("").replace(/\s+/g, " ").trim();
  const when = new Date(entry.at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  const button = el("button", { type: "button" }, el("span", {}, words.slice(0, 140)), el("small", {}, `${entry.model}, ${when}`));
  button.addEventListener("click", () => {
    $("history").close();
    page.take(entry);
  });
  return el("li", {}, button);
}

function drawChoices(page) {
  const base = new URL(".", location.href).href;
  const ways = {
    Link: () => `${base}${toFragment(page.shared())}`,
    curl: () => asCurl(page.request(), base),
    Python: () => asPython(page.request(), base),
    "Command line": () => asCommand(page.request()),
  };
  const buttons = Object.entries(ways).map(([name, make]) => choice(`Copy ${name === "Link" ? "link" : `as ${name}`}`, () => copied(name, make())));
  buttons.push(choice("Save as text", () => download("gpt2.txt", "text/plain", textOf(page.path()))));
  buttons.push(choice("Save as JSON", () => download("gpt2.json", "application/json", asJson(page.path(), page.side()))));
  $("choices").replaceChildren(...buttons);
  $("preview").textContent = ways["Command line"]();
  $("copied").textContent = "";
}

function choice(name, act) {
  const button = el("button", { type: "button" }, name);
  button.addEventListener("click", act);
  return button;
}

async function copied(name, text) {
  $("preview").textContent = text;
  $("copied").textContent = (await copy(text)) ? "Copied." : "The browser forbids it: copy it from above.";
}
