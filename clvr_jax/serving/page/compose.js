// The form for a new loop: prompt, own images, mode and budget.

import { fillList, find, h, plural } from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp"];
const LOOP_FIELDS = ["max_steps", "candidates", "max_nfe", "max_seconds"];

export class Compose {
  /** start(body): starts a loop; rejects with ApiError. */
  constructor(server, start) {
    this.server = server;
    this.start = start;
    this.images = [];
    this.form = find("compose");
    this.error = find("form-error");
    this.#setLimits();
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.submit(); });
    this.form.addEventListener("input", () => this.#showValues());
    find("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.submit(); }
    });
    find("prompt").addEventListener("paste", (event) => this.add(event.clipboardData?.files ?? []));
    find("files").addEventListener("change", (event) => { this.add(event.target.files); event.target.value = ""; });
    this.#acceptDrops(find("drop"));
    this.#showValues();
  }

  /** Fills the form with the settings of an earlier request, as POST /v1/loops takes them. */
  load({ prompt, images = [], ...fields }) {
    const { server } = this;
    find("prompt").value = prompt;
    this.form.elements.mode.value = fields.mode ?? server.modes[0];
    find("max_steps").value = fields.max_steps ?? server.max_steps;
    find("candidates").value = fields.candidates ?? 1;
    for (const name of ["seed", "size", "num_inference_steps", "max_seconds"]) find(name).value = fields[name] ?? "";
    find("max_nfe").value = fields.max_nfe ? Math.round(fields.max_nfe / this.#nfePerImage()) : find("max_nfe").max;
    this.images = images.map((text, index) => ({ name: `image ${index + 1}`, url: text }));
    this.#showImages();
    this.#showValues();
    find("prompt").focus();
  }

  /** Returns the body of POST /v1/loops. */
  body() {
    const value = (name) => find(name).value.trim();
    const body = { prompt: find("prompt").value, mode: this.form.elements.mode.value };
    for (const name of ["seed", "num_inference_steps", "max_seconds"]) if (value(name)) body[name] = Number(value(name));
    if (value("size")) body.size = value("size");
    if (value("model")) body.model = value("model");
    body.max_steps = Number(value("max_steps"));
    body.candidates = Number(value("candidates"));
    if (value("max_nfe") !== find("max_nfe").max) body.max_nfe = Number(value("max_nfe")) * this.#nfePerImage();
    if (body.mode === "one-shot") for (const name of LOOP_FIELDS) delete body[name];
    if (this.images.length) body.images = this.images.map((image) => image.url);
    return body;
  }

  async submit() {
    const button = find("generate");
    if (button.disabled) return;
    for (const field of this.form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    this.error.textContent = "";
    const invalid = [...this.form.elements].find((field) => field.willValidate && !field.checkValidity());
    if (!find("prompt").value.trim()) return this.#complain("Write a prompt first.", find("prompt"));
    if (invalid) return this.#complain(`${invalid.labels[0].textContent}: ${invalid.validationMessage}`, invalid);
    button.disabled = true;
    try {
      await this.start(this.body());
    } catch (error) {
      this.#complain(error.message, error.param && this.form.elements[error.param]);
    } finally {
      button.disabled = false;
    }
  }

  /** Adds image files, as far as the limits of the server allow. */
  async add(files) {
    const { limits } = this.server;
    for (const file of files) {
      if (!TYPES.includes(file.type)) { this.#complain(`${file.name}: only PNG, JPEG and WebP images are read.`); continue; }
      if (this.images.length >= limits.max_images) { this.#complain(`At most ${plural(limits.max_images, "image")}.`); break; }
      const url = await dataUrl(file);
      const total = this.images.reduce((sum, image) => sum + image.url.length, url.length);
      if (total > 0.98 * limits.max_body_bytes) {
        this.#complain(`${file.name}: all images together are larger than this server accepts; make them smaller.`);
        continue;
      }
      this.images.push({ name: file.name, url });
    }
    this.#showImages();
  }

  #complain(message, field = null) {
    this.error.textContent = message;
    if (field instanceof HTMLElement) {
      const closed = field.closest("details:not([open])");
      if (closed) closed.open = true;
      field.setAttribute("aria-invalid", "true");
      field.focus();
    }
  }

  #setLimits() {
    const { limits, modes, model, num_inference_steps: steps, default_size: size, max_steps: images } = this.server;
    find("prompt").maxLength = limits.max_prompt_characters;
    find("max_steps").max = limits.max_steps;
    find("max_steps").value = images;
    find("candidates").max = limits.max_candidates;
    find("max_nfe").max = limits.max_steps + 1;
    find("max_nfe").value = limits.max_steps + 1;
    find("num_inference_steps").max = limits.max_inference_steps;
    find("num_inference_steps").placeholder = steps;
    find("max_seconds").max = limits.max_seconds;
    find("max_seconds").placeholder = limits.max_seconds;
    find("size").placeholder = `auto (${size})`;
    find("model").replaceChildren(h("option", { value: model }, model));
    for (const radio of this.form.elements.mode) radio.disabled = !modes.includes(radio.value);
    if (!modes.includes("loop")) this.form.elements.mode.value = "one-shot";
  }

  /** Network evaluations of an image with the chosen number of steps. */
  #nfePerImage() {
    const { server } = this;
    return (Number(find("num_inference_steps").value) || server.num_inference_steps) * server.nfe_per_step;
  }

  #showValues() {
    const isLoop = this.form.elements.mode.value === "loop";
    find("loop-fields").hidden = find("seconds-field").hidden = !isLoop;
    const nfe = find("max_nfe");
    const limit = nfe.value === nfe.max ? "no limit" : `${Number(nfe.value) * this.#nfePerImage()}`;
    nfe.setAttribute("aria-valuetext", limit === "no limit" ? limit : `${limit} NFE`);
    find("max_steps-value").value = find("max_steps").value;
    find("candidates-value").value = find("candidates").value;
    find("max_nfe-value").value = limit;
  }

  #showImages() {
    const list = find("own-images");
    list.hidden = !this.images.length;
    fillList(list, this.images.map((image, index) => ({
      key: image,
      signature: index,
      build: () => h("li", {},
        h("img", { src: image.url, alt: image.name }),
        h("button", { type: "button", class: "remove", "aria-label": `Remove ${image.name}`, click: () => {
          this.images = this.images.filter((each) => each !== image);
          this.#showImages();
          find("files").focus();
        } }, "×")),
    })));
  }

  #acceptDrops(area) {
    const hasFiles = (event) => [...event.dataTransfer.types].includes("Files");
    const mark = (isOver) => area.classList.toggle("over", isOver);
    // A file that misses the area must not replace the page.
    for (const kind of ["dragover", "drop"]) {
      window.addEventListener(kind, (event) => { if (hasFiles(event)) event.preventDefault(); });
    }
    area.addEventListener("dragover", (event) => { if (hasFiles(event)) mark(true); });
    area.addEventListener("dragleave", (event) => { if (!area.contains(event.relatedTarget)) mark(false); });
    area.addEventListener("drop", (event) => { mark(false); this.add(event.dataTransfer.files); });
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
