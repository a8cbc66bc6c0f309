// What the user changed, in the form and style of reasoning/trajectories/page.html; a test compares the two.

import { h } from "../dom.js";
import { texts } from "../texts.js";

/** One change of a running loop, as an entry of the timeline. */
export function editEntry(edit) {
  const isRollback = (edit.rollback_to ?? null) !== null;
  const title = isRollback ? `${texts.edits.rollback} ${edit.rollback_to + 1}` : texts.edits.plan;
  const { requirements, instruction, dropped } = edit;
  return h("li", { class: "edit" },
    h("span", { class: "number" }, texts.signs.edit),
    h("div", { class: "head" }, h("strong", {}, title), h("span", { class: "badge" }, texts.edits.by_user)),
    requirements?.length ? h("div", { class: "change" }, h("b", {}, texts.edits.requirements),
      h("ul", {}, requirements.map((each) => h("li", {}, each)))) : null,
    instruction ? h("p", { class: "change" }, h("b", {}, texts.edits.instruction), ` ${instruction}`) : null,
    dropped?.length ? h("p", { class: "change" }, h("b", {}, texts.edits.dropped), ` ${dropped.map((each) => each + 1).join(", ")}`) : null);
}

/** The loop that a loop branched off from, with a link to it. */
export function parentNote(parent) {
  return [h("b", {}, texts.edits.branch), " ", h("a", { href: `#${parent.id}` }, parent.id), ` ${texts.edits.from_image} ${parent.step + 1}`];
}
