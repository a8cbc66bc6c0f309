// Elements and texts. Every text is inserted as a text node, so nothing from the server becomes markup.

/** Creates an element. Functions become listeners, true an empty attribute; null and false are left out. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key, value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replaces the children of an element, unless `signature` is that of the last call: focus and images stay then. */
export function fill(element, signature, build) {
  const text = JSON.stringify(signature);
  if (signatures.get(element) === text) return;
  signatures.set(element, text);
  element.replaceChildren(...[build()].flat(3).filter((child) => child !== null && child !== undefined && child !== false));
}
const signatures = new WeakMap();

/** Brings a list in line with entries: [{key, signature, build}]. An entry with the same signature keeps its element. */
export function fillList(list, entries) {
  const known = lists.get(list) ?? new Map();
  const next = new Map();
  for (const { key, signature, build } of entries) {
    const text = JSON.stringify(signature);
    const old = known.get(key);
    next.set(key, old && old.text === text ? old : { text, element: build() });
  }
  for (const [key, { element }] of known) if (next.get(key)?.element !== element) element.remove();
  [...next.values()].forEach(({ element }, index) => {
    if (list.children[index] !== element) list.insertBefore(element, list.children[index] ?? null);
  });
  lists.set(list, next);
}
const lists = new WeakMap();

export const find = (id) => document.getElementById(id);

/** Two digits; what is not quite 0 or 1 is not shown as if it were. */
export function probabilityText(value) {
  const text = value.toFixed(2);
  if (text === "0.00" && value > 0) return "<0.01";
  return text === "1.00" && value < 1 ? ">0.99" : text;
}

export function secondsText(seconds) {
  if (seconds < 10) return `${seconds.toFixed(2)} s`;
  return seconds < 600 ? `${seconds.toFixed(0)} s` : `${(seconds / 60).toFixed(0)} min`;
}

export function timeText(seconds) {
  return new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** A name for a file from a prompt: its first words, in letters, digits and hyphens. */
export function fileName(prompt, seed) {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  return `${words.slice(0, 60).replace(/-$/, "") || "image"}-${seed}`;
}

/** Offers a blob as a download. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
