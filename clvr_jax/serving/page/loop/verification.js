// Verifications, in the form and style of reasoning/trajectories/page.html; a test compares the two.

import { h, probabilityText } from "../dom.js";
import { expectation, unmetTexts } from "./loop_state.js";
import { texts } from "../texts.js";

/** "met", "doubt", "unmet" or "no answer". In doubt is what is unmet only because a description is not sure enough. */
export function stateOf(requirement) {
  if (requirement.met === null) return "no answer";
  if (requirement.met) return "met";
  return requirement.doubt || requirement.probability > 0.5 ? "doubt" : "unmet";
}

const styleOf = (requirement) => (requirement.met === null ? "unmet" : stateOf(requirement));

function bar(probability) {
  const level = h("span");
  level.style.width = `${(100 * probability).toFixed(0)}%`;
  return [" ", h("span", {}, probabilityText(probability)), h("span", { class: "bar", "aria-hidden": "true" }, level)];
}

/** The verification of one image. before: that of its last reference, to mark what was gained; null if there is none. */
export function checks(verification, before = null) {
  const root = h("div", { class: "checks", role: "group", "aria-label": "Verification" });
  const { requirements, description, verifier } = verification;
  if (requirements.length) {
    const unmetBefore = before && new Set(unmetTexts(before));
    const rows = requirements.map((each) => {
      const gained = each.met === true && (!unmetBefore || unmetBefore.has(each.text));
      const state = stateOf(each);
      const probability = each.probability === null ? h("span", { class: "none" }, "no probability") : bar(each.probability);
      return h("tr", { class: styleOf(each) + (gained ? " just" : "") },
        h("td", { class: "state" }, `${texts.signs[state]} ${state}`),
        h("th", { scope: "row" }, each.text, each.evidence && h("p", { class: "evidence" }, each.evidence)),
        h("td", { class: "probability" }, probability));
    });
    root.append(h("table", {}, h("tbody", {}, rows)));
    if (requirements.some((each) => stateOf(each) === "doubt")) root.append(h("p", { class: "legend" }, texts.doubt));
  } else {
    root.append(h("p", {}, "The prompt asks for nothing that can be checked."));
  }
  if (description) root.append(h("p", { class: "description" }, h("b", {}, "Description"), ` ${description}`));
  root.append(h("p", { class: "verifier" }, h("b", {}, "Verified by"), ` ${verifier || "not recorded"}`));
  return root;
}

/** How many requirements of a verification are unmet, in words. */
export function unmetCount(verification) {
  if (!verification.requirements.length) return "nothing to check";
  const count = unmetTexts(verification).length;
  return count ? `${count} unmet` : "nothing unmet";
}

/** The requirements over all images as a table: one row for each requirement, one column for each image. */
export function board(requirements, steps, best) {
  const images = steps.filter((step) => step.imageId);
  const style = (step) => [step.rolledBack && "dropped", step.number === best && "final"].filter(Boolean).join(" ");
  const cell = (step, content) => h("td", { class: style(step) }, content);
  const head = h("tr", {}, h("th", { scope: "col" }, "Image"),
    images.map((step) => h("th", { scope: "col", class: style(step) }, String(step.number + 1))));
  const rows = requirements.map((text) =>
    h("tr", {}, h("th", { scope: "row" }, text), images.map((step) => cell(step, mark(step.verification, text)))));
  const feet = [
    ["unmet", (verification) => String(unmetTexts(verification).length)],
    ["met, expected", (verification) => expectation(verification).toFixed(2)],
  ].map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name),
    images.map((step) => cell(step, step.verification ? value(step.verification) : "?"))));
  return h("div", { class: "board verified", role: "region", "aria-label": "Requirements", tabindex: "0" },
    h("table", {}, h("thead", {}, head), h("tbody", {}, rows), images.length ? h("tfoot", {}, feet) : null));
}

function mark(verification, text) {
  const requirement = verification?.requirements.find((each) => each.text === text);
  if (!requirement) return h("span", { class: "none", title: "not verified" }, "·");
  const state = stateOf(requirement);
  const known = requirement.probability === null ? "no probability"
    : `probability of being met ${probabilityText(requirement.probability)}`;
  const title = `${state}; ${known}${requirement.evidence ? `; ${requirement.evidence}` : ""}`;
  return h("span", { class: styleOf(requirement), title }, texts.signs[state],
    requirement.probability === null ? null : bar(requirement.probability));
}
