// Text as token ids, for one model or another.

import { ask } from "./api.js";
import { begunByModel } from "./tree.js";

const encoded = new Map();

export async function encode(text, shape, signal) {
  if (!text) return [];
  const key = `${shape.fingerprint}/${text}`;
  if (!encoded.has(key)) {
    if (encoded.size > 200) encoded.clear();
    encoded.set(key, (await ask("tokenize", { model: shape.name, text }, signal)).tokens);
  }
  return encoded.get(key);
}

// The ids of a path for a model: what it said as it said it, and text encoded. What nobody began stands after the end
// of another text, as it does when the model begins one.
export async function idsOf(path, shape, signal) {
  const ids = begunByModel(path) ? [shape.end_of_text] : [];
  for (let i = 0; i < path.length; ) {
    if (isOf(path[i], shape)) {
      ids.push(path[i++].said.id);
      continue;
    }
    let text = "";
    while (i < path.length && !isOf(path[i], shape)) text += path[i++].text;
    for (const id of await encode(text, shape, signal)) ids.push(id);
  }
  return ids;
}

export const isOf = (node, shape) => node.said !== null && node.said.vocabulary === shape.fingerprint;
