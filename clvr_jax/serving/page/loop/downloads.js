// Files: a PNG with its parameters in a text chunk, and the archive of a loop.

import { fileName, save } from "../dom.js";

/** Downloads the image of a step. Its parameters are in the PNG's text "parameters", as JSON. */
export async function downloadImage(api, state, number) {
  const step = state.steps[number];
  const png = await (await api.blob(`/v1/images/${step.imageId}.png/content`)).arrayBuffer();
  const parameters = {
    ...state.request, prompt: state.prompt, model: state.model, mode: state.mode, seed: state.seed, loop: state.id,
    step: number, step_seed: step.seed, instruction: step.reasoning, nfe: step.nfe, outcome: state.outcome,
    requirements: step.verification?.requirements ?? null,
  };
  const content = withText(new Uint8Array(png), "parameters", JSON.stringify(parameters));
  save(new Blob([content], { type: "image/png" }), `${fileName(state.prompt, state.seed)}-image-${number + 1}.png`);
}

/** Downloads all files of a loop. */
export async function downloadArchive(api, state) {
  save(await api.blob(`/v1/loops/${state.id}/archive`), `${fileName(state.prompt, state.seed)}.zip`);
}

/** Returns a PNG with an international text chunk in front of its pixels. */
export function withText(png, keyword, text) {
  const encode = (value) => new TextEncoder().encode(value);
  // Keyword, end of keyword, no compression (2 bytes), no language and no translated keyword (2 bytes), text.
  const data = new Uint8Array([...encode("iTXt"), ...encode(keyword), 0, 0, 0, 0, 0, ...encode(text)]);
  const chunk = new Uint8Array(data.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, data.length - 4);
  chunk.set(data, 4);
  view.setUint32(data.length + 4, crc32(data));
  const headerEnd = 8 + 25; // signature and IHDR
  const result = new Uint8Array(png.length + chunk.length);
  result.set(png.subarray(0, headerEnd));
  result.set(chunk, headerEnd);
  result.set(png.subarray(headerEnd), headerEnd + chunk.length);
  return result;
}

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  }
  return (crc ^ 0xffffffff) >>> 0;
}
