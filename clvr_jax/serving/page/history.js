// The history: loops of the server, newest first, with search, and what can be done with each.

import { fillList, find, h, timeText } from "./dom.js";
import { loopImage } from "./image.js";

const PAGE = 20;
const REFRESH_MS = 4000;
const SEARCH_MS = 250;

export class History {
  /** actions: {runAgain(item), copy(item), remove(item)}, each returns a promise. */
  constructor(api, actions) {
    Object.assign(this, { api, actions, items: [], hasMore: false, current: null, query: "" });
    find("more-entries").addEventListener("click", () => this.more());
    let timer = 0;
    find("search").addEventListener("input", (event) => {
      clearTimeout(timer);
      timer = setTimeout(() => { this.query = event.target.value.trim(); this.refresh(true); }, SEARCH_MS);
    });
    setInterval(() => { if (!document.hidden && this.items.some(isUnfinished)) this.refresh(); }, REFRESH_MS);
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.refresh(); });
  }

  /** Marks the loop that is shown. */
  select(id) {
    this.current = id;
    this.#show();
  }

  /** Loads the newest entries again; older ones that are shown stay. */
  async refresh(fromStart = false) {
    const query = this.query;
    const found = await this.#load().catch(() => null);
    if (found === null || query !== this.query) return;
    if (fromStart || !found.has_more) {
      this.items = found.data;
      this.hasMore = found.has_more;
    } else {
      const last = found.data.at(-1);
      const known = this.items.findIndex((item) => item.id === last.id);
      this.items = [...found.data, ...(known >= 0 ? this.items.slice(known + 1) : [])];
      if (known < 0) this.hasMore = true;
    }
    this.#show();
  }

  async more() {
    const found = await this.#load(this.items.at(-1)?.id).catch(() => null);
    if (found === null) return;
    this.items.push(...found.data);
    this.hasMore = found.has_more;
    this.#show();
  }

  #load(before) {
    const values = new URLSearchParams({ limit: PAGE });
    if (before) values.set("before", before);
    if (this.query) values.set("query", this.query);
    return this.api.json(`/v1/loops?${values}`);
  }

  async #perform(action) {
    find("history-error").textContent = "";
    await action().catch((error) => { find("history-error").textContent = error.message; });
  }

  #show() {
    fillList(find("entries"), this.items.map((item) => ({
      key: item.id,
      signature: [item.status, item.image_id, item.outcome, item.id === this.current],
      build: () => this.#entry(item),
    })));
    find("more-entries").hidden = !this.hasMore;
    find("no-entries").hidden = this.items.length > 0;
    find("no-entries").textContent = this.query ? "No prompt has these words." : "No loops yet.";
  }

  #entry(item) {
    const isCurrent = item.id === this.current;
    const thumb = item.image_id
      ? loopImage(this.api, item.image_id, "", 56, "webp") : h("span", { class: "blank-thumb", "aria-hidden": "true" });
    const word = item.status === "finished" ? item.outcome : item.status;
    const style = item.outcome === "accepted" ? "badge good" : item.status === "failed" ? "badge open" : "badge";
    const act = (label, action) => h("button", { type: "button", class: "quiet", click: () => this.#perform(action) }, label);
    const buttons = [act("Run again", () => this.actions.runAgain(item)), act("Copy prompt", () => this.actions.copy(item))];
    if (!isUnfinished(item)) buttons.push(confirmButton("Delete", "Really delete?", () => this.#perform(() => this.actions.remove(item))));
    return h("li", { class: isCurrent ? "current" : null },
      h("a", { href: `#${item.id}`, "aria-current": isCurrent ? "true" : null },
        h("span", { class: "thumb" }, thumb),
        h("span", { class: "entry" },
          h("span", { class: "entry-prompt" }, item.prompt),
          h("span", { class: "entry-facts" }, h("span", { class: style }, modeWord(item, word)), timeText(item.created)))),
      h("div", { class: "entry-actions", role: "group", "aria-label": "Actions for this loop" }, buttons));
  }
}

const isUnfinished = (item) => ["queued", "running"].includes(item.status);
const modeWord = (item, word) => (item.mode === "one-shot" && word === "unverified" ? "one shot" : word);

/** A button that acts on the second click. */
export function confirmButton(label, question, action) {
  const button = h("button", { type: "button", class: "quiet", blur: () => reset(), click: () => {
    if (button.dataset.asked) { reset(); action(); return; }
    button.dataset.asked = "yes";
    button.textContent = question;
  } }, label);
  const reset = () => { delete button.dataset.asked; button.textContent = label; };
  return button;
}
