// The timeline of a loop: one entry for each image, one for what happens now, one for the end.

import { fillList, h, secondsText } from "../dom.js";
import { editEntry } from "./edits.js";
import { isAccepted, isEnded, unmetTexts } from "./loop_state.js";
import { loopImage } from "../image.js";
import { checks, unmetCount } from "./verification.js";
import { texts } from "../texts.js";

const WIDTH = 220;
const UNMET = /(?<![\p{L}\p{N}_<])\*{0,2}Unmet\*{0,2}:\*{0,2}[ \t]*.*?(?:\.(?=\s|$)|\n|$)/u;

/** Fills the list with the steps of a loop. controls(step): further buttons of a step; [] if there are none. */
export function showTimeline(list, api, state, controls) {
  const entries = state.steps.flatMap((step) => {
    const before = state.steps[step.references.at(-1)]?.verification ?? null;
    const plans = step.number === 0 ? state.plans : [];
    const best = step.number !== state.best ? null : isEnded(state) ? "result" : "best so far";
    const buttons = controls(step);
    const isInherited = step.number < state.inherited;
    const signature = [step, before, plans, best, buttons.map((each) => each.name), isInherited];
    const build = step.imageId ? () => imageEntry(api, step, before, plans, best, buttons, isInherited) : () => stopEntry(step, state);
    return [...editsBefore(state, step.number), { key: `step ${step.number}`, signature, build }];
  });
  entries.push(...editsBefore(state, state.steps.length));
  if (!isEnded(state) && ["planning", "checking plan", "generating", "deciding"].includes(state.activity.kind)) {
    const now = { ...state.activity, reply: state.reply, plans: state.steps.length ? [] : state.plans };
    const { done, ...rest } = now;
    entries.push({ key: "now", signature: [rest, state.steps.length, state.inferenceSteps],
      build: () => pendingEntry(now, state.steps.length, state.inferenceSteps) });
  }
  fillList(list, entries);
  const bar = list.querySelector(".pending [role=progressbar]");
  if (bar) showProgress(bar, state.activity.done ?? 0, state.inferenceSteps);
}

/** The user's changes after which the step with this number was made. */
function editsBefore(state, number) {
  return state.edits.map((edit, index) => ({ key: `edit ${index}`, signature: edit, step: edit.step, build: () => editEntry(edit) }))
    .filter((entry) => entry.step === number);
}

/** Moves the denoising bar without building it anew. */
function showProgress(bar, done, steps) {
  bar.firstChild.style.width = `${(100 * done) / steps}%`;
  bar.setAttribute("aria-valuenow", done);
  bar.setAttribute("aria-valuetext", `step ${done} of ${steps}`);
}

function imageEntry(api, step, before, plans, best, buttons, isInherited) {
  const { verification } = step;
  const alt = `Image ${step.number + 1}${verification ? `, ${unmetCount(verification)}` : ""}`;
  const item = h("li", { class: step.rolledBack ? "rolled" : "kept" },
    h("span", { class: "number" }, String(step.number + 1)),
    h("div", { class: "step" },
      h("div", { class: "mat" }, loopImage(api, step.imageId, alt, WIDTH)),
      h("div", {},
        h("div", { class: "head" }, badges(step, best, isInherited)),
        rejectedPlans(plans, step.attempts),
        says(step.reasoning),
        verification ? checks(verification, before) : null,
        price(step),
        buttons.length ? h("div", { class: "buttons" }, buttons.map((each) => each.build())) : null)));
  return item;
}

function stopEntry(step, state) {
  const isAccepted = state.outcome === "accepted";
  return h("li", { class: isAccepted ? "stop accepted" : "stop" },
    h("span", { class: "number" }, isAccepted ? "✓" : "■"),
    h("div", { class: "head" }, h("strong", {}, isAccepted ? "Accepted" : "Stopped"), attempts(step)),
    says(step.reasoning), price(step));
}

/** What happens now, before there is an image: the plan or the next instruction, and a place for the image. */
function pendingEntry(now, number, steps) {
  const isGenerating = now.kind === "generating";
  const text = isGenerating || now.kind === "checking plan" ? now.reply?.reasoning : null;
  return h("li", { class: "pending" },
    h("span", { class: "number" }, String(number + 1)),
    h("div", { class: "step" },
      h("div", { class: "mat empty", "aria-hidden": "true" }, isGenerating ? h("span", { class: "shimmer" }) : null),
      h("div", {},
        h("div", { class: "head" }, h("span", { class: "badge" }, PENDING[now.kind])),
        isGenerating && steps ? h("div", { class: "bar denoising", role: "progressbar", "aria-label": "Denoising",
          "aria-valuemin": 0, "aria-valuemax": steps }, h("span")) : null,
        rejectedPlans(now.plans, isGenerating ? now.reply?.attempts : null),
        text ? says(text) : null)));
}

const PENDING = {
  planning: "planning", "checking plan": "plan is verified", generating: "generating", deciding: "deciding what to change",
};

/** Plans that could not be read or missed a requirement. carriedOut: the attempt whose plan is not one of them. */
function rejectedPlans(plans, carriedOut) {
  const isRejected = (plan) => plan.error !== null || (plan.verification && !isAccepted(plan.verification));
  const rejected = plans.filter((plan) => isRejected(plan) && plan.attempt + 1 !== carriedOut);
  if (!rejected.length) return null;
  const items = rejected.map((plan) => h("li", {}, h("p", {}, plan.reasoning || "(empty)"),
    h("p", { class: "missed" }, plan.error ?? `misses: ${unmetTexts(plan.verification).join("; ")}`)));
  const summary = `${rejected.length} ${rejected.length === 1 ? "plan that misses" : "plans that miss"} a requirement`;
  return h("details", { class: "plans" }, h("summary", {}, summary), h("ol", {}, items));
}

function badges(step, best, isInherited) {
  const { verification } = step;
  const found = attempts(step);
  if (verification) {
    found.unshift(h("span", { class: isAccepted(verification) ? "badge good" : "badge open" }, unmetCount(verification)));
  }
  if (best) found.push(badge(best));
  if (isInherited) found.push(badge(texts.edits.inherited));
  if (step.redraw) found.push(badge(`generated again (${step.redraw})`));
  if (step.leftOut) found.push(badge(`generated without the oldest replies (${step.leftOut})`));
  if (step.rolledBack) found.push(badge("rolled back"));
  return found;
}

const badge = (text) => h("span", { class: "badge" }, text);
const attempts = (step) => (step.attempts === 1 ? []
  : [badge(step.attempts ? `readable at attempt ${step.attempts}` : texts.edits.own_instruction)]);

/** The controller's reply; what comes before the instruction is set back. */
function says(text) {
  const match = UNMET.exec(text);
  const end = match ? match.index + match[0].length : 0;
  return h("p", { class: "says" }, end ? h("span", { class: "aside" }, text.slice(0, end)) : null, text.slice(end));
}

function price(step) {
  const parts = [];
  if (step.imageId) parts.push(`${step.nfe} NFE`);
  parts.push(secondsText(step.seconds));
  if (step.imageId && step.references.length) parts.push(`references ${step.references.map((each) => each + 1).join(", ")}`);
  if (step.imageId && step.seed !== null) parts.push(`seed ${step.seed}`);
  return h("p", { class: "price" }, parts.map((part) => h("span", {}, part)));
}
