// Two images on top of each other, with a slider that moves the border between them.

import { fill, find, h } from "../dom.js";

const WIDTH = 384;
const SMALL = 128;

export class Compare {
  constructor(api) {
    this.api = api;
    this.root = find("compare");
    this.close();
  }

  close() {
    this.isOpen = false;
    this.choice = [null, null];
    this.root.hidden = true;
  }

  /** Opens with two of the images of the last call of `update`. */
  open(left, right) {
    this.isOpen = true;
    this.choice = [left, right];
    this.#show();
    this.root.scrollIntoView({ block: "nearest" });
    this.root.focus({ preventScroll: true });
  }

  /** images: [{key, imageId, label}]. note: a sentence about them. */
  update(images, note = "") {
    this.images = images;
    this.note = note;
    if (this.isOpen) this.#show();
  }

  #show() {
    const has = (key) => this.images.some((image) => image.key === key);
    if (!this.choice.every(has)) {
      if (this.images.length < 2) { this.close(); return; }
      this.choice = [this.images[0].key, this.images.at(-1).key];
    }
    this.root.hidden = false;
    fill(this.root, [this.images, this.choice, this.note], () => this.#build());
  }

  #build() {
    const [left, right] = this.choice.map((key) => this.images.find((image) => image.key === key));
    const stage = h("div", { class: "stage" }, this.#image(left, "left"), this.#image(right, "right"), h("span", { class: "divider", "aria-hidden": "true" }));
    const range = h("input", { type: "range", min: 0, max: 100, value: 50, step: 1, "aria-label": "Border between the images",
      class: "border", input: () => show() });
    const show = () => {
      stage.style.setProperty("--at", `${range.value}%`);
      range.setAttribute("aria-valuetext", `${range.value} % ${left.label}, ${100 - range.value} % ${right.label}`);
    };
    show();
    return [
      h("div", { class: "compare-head" }, h("h2", { id: "compare-title" }, "Compare"),
        h("button", { type: "button", class: "quiet", click: () => this.close() }, "Close")),
      h("div", { class: "compare-body" },
        h("div", {}, h("div", { class: "mat" }, stage), range),
        h("div", { class: "choices" }, this.#select("Left", 0), this.#select("Right", 1), this.note && h("p", { class: "note" }, this.note))),
    ];
  }

  #select(label, side) {
    const id = `compare-${label.toLowerCase()}`;
    const options = this.images.map((image) => h("option", { value: image.key, selected: image.key === this.choice[side] }, image.label));
    const change = (event) => { this.choice[side] = event.target.value; this.#show(); find(id)?.focus(); };
    return h("div", { class: "field" }, h("label", { for: id }, label), h("select", { id, change }, options));
  }

  #image({ imageId, label }, side) {
    const image = h("img", { alt: `${side === "left" ? "Left" : "Right"}: ${label}`, class: side });
    image.addEventListener("load", () => {
      const isSmall = Math.max(image.naturalWidth, image.naturalHeight) <= SMALL;
      const factor = isSmall ? Math.max(1, Math.round(WIDTH / image.naturalWidth)) : 1;
      image.width = image.naturalWidth * factor;
      image.height = image.naturalHeight * factor;
      image.classList.toggle("crisp", isSmall);
    });
    this.api.imageUrl(imageId).then((url) => { image.src = url; }, () => {});
    return image;
  }
}
