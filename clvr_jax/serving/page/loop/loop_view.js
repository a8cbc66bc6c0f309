// One loop: its events, what is known about it, and what can be done with it.

import { fill, find, h, plural, secondsText } from "../dom.js";
import { apply, complete, initialState, isAccepted, isEnded, unmetTexts } from "./loop_state.js";
import { Compare } from "./compare.js";
import { Controls } from "./controls.js";
import { downloadArchive, downloadImage } from "./downloads.js";
import { parentNote } from "./edits.js";
import { confirmButton } from "../history.js";
import { loopImage } from "../image.js";
import { showTimeline } from "./timeline.js";
import { board, unmetCount } from "./verification.js";
import { texts } from "../texts.js";

const RESULT_WIDTH = 384;
const LONG_PROMPT = 140;
const POLL_MS = 1000;

export class LoopView {
  /** actions: {runAgain, edit, copy, remove}(item), open(id), and changed(), which is called when the loop starts or
   *  ends. */
  constructor(api, server, actions) {
    Object.assign(this, { api, server, actions, state: null, stopping: null, waiting: null, oneShot: null, isConnected: true });
    this.compare = new Compare(api);
    this.controls = new Controls(api, actions.open, (text) => { this.waiting = text; this.#show(); });
    setInterval(() => this.#showElapsed(), 1000);
  }

  close() {
    this.abort?.abort();
    this.state = null;
    find("loop").hidden = true;
    find("welcome").hidden = false;
    document.title = "clvr";
  }

  /** Shows a loop and follows it until its end. */
  async open(id) {
    this.abort?.abort();
    const abort = this.abort = new AbortController();
    const { signal } = abort;
    this.compare.close();
    Object.assign(this, { stopping: null, waiting: null, oneShot: null, isConnected: true });
    find("loop-error").textContent = "";
    let item;
    try {
      item = await this.api.json(`/v1/loops/${encodeURIComponent(id)}`, { signal });
    } catch (error) {
      if (signal.aborted) return;
      this.close();
      throw error;
    }
    if (signal.aborted) return;
    this.state = initialState(item);
    this.item = item;
    this.since = Date.now();
    find("welcome").hidden = true;
    find("loop").hidden = false;
    this.#showInputs(signal);
    this.#show();
    if (item.status === "queued") this.#pollPosition(signal);
    await this.#follow(id, signal).catch((error) => { if (!signal.aborted) this.#complain(error); });
    const stored = sessionStorage.getItem(`one-shot ${id}`);
    if (stored && !signal.aborted) this.#followOneShot(stored, signal).catch(() => sessionStorage.removeItem(`one-shot ${id}`));
  }

  async #follow(id, signal) {
    const wasEnded = isEnded(this.state);
    const { state } = this;
    await this.api.follow(id, (event) => {
      const { kind, number } = state.activity;
      apply(state, event);
      state.lastEvent = event.id;
      if (state.activity.kind !== kind || state.activity.number !== number) this.since = Date.now();
      if (!wasEnded) this.#announce(event);
      this.#show();
    }, (isConnected) => { this.isConnected = isConnected; this.#show(); }, signal);
    if (signal.aborted) return;
    this.item = await this.api.json(`/v1/loops/${encodeURIComponent(id)}`, { signal });
    complete(state, this.item);
    this.stopping = null;
    this.#show();
    if (!wasEnded) this.actions.changed();
  }

  async #pollPosition(signal) {
    while (!signal.aborted && this.state?.status === "queued") {
      const item = await this.api.json(`/v1/loops/${this.state.id}`, { signal }).catch(() => null);
      if (item && !signal.aborted && this.state.status === "queued") {
        this.state.position = item.queue_position;
        this.#show();
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }

  async #showInputs(signal) {
    const section = find("given");
    section.hidden = true;
    const found = await this.api.json(`/v1/loops/${this.state.id}/input_images`, { signal }).catch(() => null);
    if (signal.aborted || !found?.data.length) return;
    section.hidden = false;
    section.replaceChildren(h("h2", {}, "Your images"), ...found.data.map((image, index) =>
      h("div", { class: "mat" }, h("img", { src: `data:image/png;base64,${image.b64_json}`, alt: `Your image ${index + 1}` }))));
  }

  // --- what is shown

  #show() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      if (this.state) this.#render();
    });
  }

  #render() {
    const { state } = this;
    find("loop").dataset.event = state.lastEvent ?? -1;
    document.title = `${isEnded(state) ? "" : "… "}${state.prompt.slice(0, 60)} - clvr`;
    const [word, style, note] = statusOf(state);
    fill(find("overline"), [word, style, note], () => [h("span", { class: `badge ${style}` }, word), h("span", {}, note)]);
    const title = find("title");
    title.textContent = state.prompt;
    title.classList.toggle("long", state.prompt.length > LONG_PROMPT);
    find("activity").hidden = isEnded(state);
    find("activity-text").textContent = this.isConnected ? this.stopping ?? this.waiting ?? activityText(state) : "Connection lost; trying again";
    find("parent").hidden = !state.parent;
    fill(find("parent"), state.parent && [state.parent.id, state.parent.step], () => (state.parent ? parentNote(state.parent) : []));
    this.#showElapsed();
    this.#renderFacts();
    this.#renderToolbar();
    this.#renderResult();
    showTimeline(find("steps"), this.api, state, (step) => this.controls.ofStep(state, step));
    find("timeline").hidden = !find("steps").children.length;
    this.#updateCompare();
  }

  #showElapsed() {
    const { state } = this;
    if (!state || isEnded(state)) return;
    const seconds = Math.floor((Date.now() - this.since) / 1000);
    find("elapsed").textContent = seconds >= 2 ? `${seconds} s` : "";
  }

  #renderFacts() {
    const { state } = this;
    const images = state.steps.filter((step) => step.imageId && step.number >= state.inherited);
    const nfe = images.reduce((sum, step) => sum + step.nfe, 0);
    const dropped = images.filter((step) => step.rolledBack).length;
    const limits = { ...state.request, ...(state.budget ?? {}) };
    const isLoop = state.mode === "loop";
    const maxSteps = isLoop ? limits.max_steps ?? this.server.max_steps : 1;
    const facts = [
      ["Model", state.model, null],
      ["Images", `${images.length} of at most ${maxSteps}${dropped ? `, ${dropped} rolled back` : ""}`, images.length / maxSteps],
      ["Network evaluations", limits.max_nfe && isLoop ? `${nfe} of at most ${limits.max_nfe}` : String(nfe),
        limits.max_nfe && isLoop ? nfe / limits.max_nfe : null],
      ["Time", secondsText(state.seconds), null],
      ["Seed", String(state.seed), null],
    ];
    fill(find("facts"), facts, () => facts.map(([name, value, share]) => {
      const level = h("span");
      level.style.width = `${Math.min(100, 100 * share)}%`;
      return h("div", {}, h("dt", {}, name), h("dd", {}, value), share === null || isEnded(state) ? null
        : h("dd", { class: "level", "aria-hidden": "true" }, h("span", { class: "bar" }, level)));
    }));
  }

  #renderToolbar() {
    const { state } = this;
    const button = (label, action, attributes = {}) =>
      h("button", { type: "button", ...attributes, click: () => this.#perform(action) }, label);
    const hasBest = state.best !== null;
    const count = state.steps.filter((step) => step.imageId).length;
    const canCompare = count + (this.oneShot?.imageId ? 1 : 0) > 1;
    const nfe = this.#equalNfe();
    const signature = [isEnded(state), hasBest, this.stopping, canCompare, nfe, this.oneShot?.status, state.id];
    fill(find("toolbar"), signature, () => {
      const isPrimary = isEnded(state) ? "primary" : null;
      const save = hasBest && button("Download PNG", () => downloadImage(this.api, state, state.best), { class: isPrimary });
      const compare = canCompare && button("Compare", () => this.#openCompare());
      if (!isEnded(state)) {
        const isStopping = this.stopping !== null;
        return [
          button("Accept now", () => this.#stop("accept"), { class: "primary", disabled: !hasBest || isStopping }),
          button("Cancel", () => this.#stop("cancel"), { disabled: isStopping }),
          this.controls.canEdit(state) && button("Edit plan", () => this.controls.editPlan(state), { disabled: isStopping }),
          compare, save,
        ];
      }
      return [
        save,
        count && button("Trajectory", () => downloadArchive(this.api, state)),
        compare,
        nfe && !this.oneShot && button(`One shot at ${nfe} NFE`, () => this.#startOneShot(nfe)),
        this.oneShot && !this.oneShot.imageId && h("span", { class: "busy" }, this.oneShot.error ?? "One shot is generated …"),
        h("span", { class: "quiet-group" },
          button("Run again", () => this.actions.runAgain(this.item), { class: "quiet" }),
          button("Edit settings", () => this.actions.edit(this.item), { class: "quiet" }),
          button("Copy prompt", () => this.actions.copy(this.item), { class: "quiet" }),
          confirmButton("Delete", "Really delete?", () => this.#perform(() => this.actions.remove(this.item)))),
      ];
    });
  }

  #renderResult() {
    const { state } = this;
    const best = state.best === null ? null : state.steps[state.best];
    const count = state.steps.filter((step) => step.imageId).length;
    find("result").hidden = !best && !state.requirements?.length && !isEnded(state);
    fill(find("figure"), [best?.imageId, best?.verification, count, isEnded(state)], () => {
      if (!best?.imageId) return isEnded(state) ? h("p", { class: "blank" }, "No image was generated.") : h("div", { class: "mat empty" });
      const found = best.verification ? `, ${unmetCount(best.verification)}` : "";
      const text = `Image ${best.number + 1} of ${count}${found}`;
      return [h("div", { class: "mat" }, loopImage(this.api, best.imageId, `${isEnded(state) ? "The result" : "The best so far"}: ${text}`, RESULT_WIDTH)),
        h("figcaption", {}, isEnded(state) ? text : `Best so far: ${text}`)];
    });
    const requirements = state.requirements ?? requirementsOf(state.steps);
    const marks = state.steps.map((step) => [step.imageId, step.rolledBack, step.verification]);
    fill(find("board"), [requirements, marks, state.best], () =>
      requirements.length ? [h("h2", {}, "Requirements"), board(requirements, state.steps, state.best)] : []);
  }

  #announce(event) {
    const { state } = this;
    const said = {
      image: () => `Image ${event.step + 1} is generated.`,
      verification: () => {
        const all = event.requirements.length;
        const open = unmetTexts(event);
        return isAccepted(event) ? `Image ${event.step + 1} meets everything.`
          : `Image ${event.step + 1} meets ${all - open.length} of ${plural(all, "requirement")}. Unmet: ${open.join("; ") || "nothing"}.`;
      },
      edited: () => (event.rollback_to === undefined ? "The plan is changed." : `The loop has returned to image ${event.rollback_to + 1}.`),
      rolled_back: () => state.edits.at(-1)?.id === event.id - 1 ? find("announcer").textContent : `Image ${event.step + 1} is worse than image ${event.to + 1}, which is taken up again.`,
      done: () => `The loop has ended: ${statusOf(state)[0]}.`,
    }[event.type];
    if (said) find("announcer").textContent = said();
  }

  // --- what can be done

  async #perform(action) {
    find("loop-error").textContent = "";
    try {
      await action();
    } catch (error) {
      this.#complain(error);
    }
  }

  #complain(error) {
    find("loop-error").textContent = error.message;
  }

  async #stop(how) {
    const { state } = this;
    this.stopping = how === "accept" ? "Accepting the best image so far" : "Canceling; the best image is kept";
    this.#show();
    try {
      const { command } = await this.api.json(`/v1/loops/${state.id}/${how}`, { method: "POST" });
      if (command.state === "sent" && this.state === state && this.stopping !== null) {
        this.stopping += "; the server that runs this loop has not answered yet";
        this.#show();
      }
    } catch (error) {
      this.stopping = null;
      this.#show();
      if (error.code !== "not_running") throw error;
    }
  }

  /** Evaluations of a one-shot image that cost as much as this loop; null for a one-shot image itself. */
  #equalNfe() {
    const { state } = this;
    const images = state.steps.filter((step) => step.imageId);
    if (state.mode !== "loop" || !images.length || !state.inferenceSteps) return null;
    return images.reduce((sum, step) => sum + step.nfe, 0);
  }

  async #startOneShot(nfe) {
    const { state, server } = this;
    const perStep = Math.max(1, Math.round(state.steps[0].nfe / state.inferenceSteps));
    const steps = Math.min(server.limits.max_inference_steps, Math.max(1, Math.round(nfe / perStep)));
    const images = await this.api.json(`/v1/loops/${state.id}/input_images`);
    const body = { prompt: state.prompt, mode: "one-shot", seed: state.seed, num_inference_steps: steps };
    for (const name of ["size", "guidance_scale"]) if (state.request[name] !== undefined) body[name] = state.request[name];
    if (images.data.length) body.images = images.data.map((image) => image.b64_json);
    const { id } = await this.api.json("/v1/loops", { method: "POST", body });
    sessionStorage.setItem(`one-shot ${state.id}`, id);
    this.actions.changed();
    await this.#followOneShot(id, this.abort.signal, true);
  }

  async #followOneShot(id, signal, isNew = false) {
    const oneShot = this.oneShot = { status: "running", imageId: null, nfe: null, error: null };
    this.#show();
    await this.api.follow(id, (event) => {
      if (event.type === "image") Object.assign(oneShot, { imageId: event.image_id, nfe: event.nfe });
      if (event.type === "done") Object.assign(oneShot, { status: event.status, error: event.error ?? null });
    }, () => {}, signal);
    if (signal.aborted) return;
    this.#updateCompare();
    this.#show();
    if (isNew && oneShot.imageId) {
      this.compare.open("one-shot", `step ${this.state.best}`);
      find("announcer").textContent = "The one-shot image is generated.";
    }
    this.actions.changed();
  }

  #updateCompare() {
    const { state, oneShot } = this;
    const images = state.steps.filter((step) => step.imageId).map((step) => {
      const isBest = step.number === state.best;
      return { key: `step ${step.number}`, imageId: step.imageId, label: `Image ${step.number + 1}${isBest ? ", result of the loop" : ""}` };
    });
    let note = "";
    if (oneShot?.imageId) {
      images.push({ key: "one-shot", imageId: oneShot.imageId, label: `One shot, ${oneShot.nfe} NFE` });
      note = `The loop took ${this.#equalNfe()} NFE for ${plural(images.length - 1, "image")}, the one shot ${oneShot.nfe} NFE for one.`;
    }
    this.compare.update(images, note);
  }

  #openCompare() {
    const { images, choice } = this.compare;
    const best = `step ${this.state.best}`;
    const other = images.filter((image) => image.key !== best);
    const first = this.oneShot?.imageId ? "one-shot" : other[0].key;
    this.compare.open(choice[0] ?? first, choice[1] ?? best);
  }
}

function requirementsOf(steps) {
  const verification = steps.find((step) => step.verification)?.verification;
  return verification ? verification.requirements.map((each) => each.text) : [];
}

/** Word, style and sentence of the status of a loop. */
function statusOf(state) {
  if (!isEnded(state)) return [state.status, "", ""];
  if (state.status === "finished" || state.status === "canceled") {
    const outcome = state.outcome ?? state.status;
    if (state.mode === "one-shot" && outcome === "unverified") return ["one shot", "", "Generated from the prompt itself; nothing was verified."];
    const kept = state.status === "canceled" && state.best !== null ? " The best image so far is kept." : "";
    const note = `${texts.outcomes[outcome] ?? ""}${kept}${state.error ? ` ${state.error}` : ""}`;
    return [outcome, outcome === "accepted" ? "good" : "open", note];
  }
  const notes = { interrupted: "The server ended before the loop did.", failed: "" };
  return [state.status, "open", `${notes[state.status] ?? ""} ${state.error ?? ""}`.trim()];
}

/** What the loop does now, in words. */
function activityText(state) {
  const { activity, position, inferenceSteps: steps } = state;
  const number = (activity.number ?? 0) + 1;
  const again = activity.attempt ? `, attempt ${activity.attempt + 1}` : "";
  const images = activity.images > 1 ? `images ${number} to ${number + activity.images - 1}` : `image ${number}`;
  return {
    queued: position === null ? "Waiting for a place" : position === 0 ? "Next in the queue" : `Waiting, ${plural(position, "request")} ahead`,
    requirements: "Deriving the requirements from the prompt",
    planning: `Planning${again}`,
    "checking plan": "Verifying the plan",
    generating: `Generating ${images}${activity.done ? `, denoising step ${activity.done} of ${steps}` : steps ? `, ${plural(steps, "denoising step")}` : ""}`,
    verifying: `Verifying image ${number}`,
    deciding: "Deciding what to change",
    ending: "Finishing the step",
  }[activity.kind];
}
