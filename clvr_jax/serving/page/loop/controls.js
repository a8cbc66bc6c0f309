// Changes of a loop by its user: plan, next instruction, rollback and branches.

import { find, h } from "../dom.js";
import { isEnded } from "./loop_state.js";

const MAX_SEED = 2 ** 31 - 1;

export class Controls {
  /** opened(id): is called with a new branch. waiting(text): shows what waits for the loop; null ends that. */
  constructor(api, opened, waiting) {
    Object.assign(this, { api, opened, waiting });
    this.dialog = find("edit-dialog");
    this.form = find("edit-form");
    find("edit-cancel").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => {
      if (!this.dialog.open) this.apply = null; // it comes with the next frame, when the dialog may be open again
    });
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.#submit(); });
  }

  /** Whether the plan of a loop can be changed. */
  canEdit(state) {
    return state.mode === "loop" && !isEnded(state);
  }

  /** Opens the dialog for the requirements and the next instruction. */
  editPlan(state) {
    const before = state.requirements ?? [];
    const fields = [
      { name: "requirements", label: "Requirements, one in each line", rows: 6, value: before.join("\n") },
      { name: "instruction", label: "Instruction for the next image; the controller's if empty", rows: 3, value: "" },
    ];
    this.#open("Edit the plan", "Apply", fields, async (values) => {
      const body = {};
      const requirements = values.requirements.split("\n").map((line) => line.trim()).filter(Boolean);
      if (JSON.stringify(requirements) !== JSON.stringify(before)) body.requirements = requirements;
      if (values.instruction.trim()) body.instruction = values.instruction.trim();
      if (!Object.keys(body).length) return;
      await this.api.request(`/v1/loops/${state.id}/plan`, { method: "POST", body });
    });
  }

  /** Buttons of one step: [{name, build}]. */
  ofStep(state, step) {
    if (!step.imageId || state.mode !== "loop") return [];
    const button = (name, label, action) => ({
      name, build: () => h("button", { type: "button", class: "quiet", click: action }, `${label} ${step.number + 1}`),
    });
    const found = [button("branch", "Branch from image", () => this.#branch(state, step))];
    if (!isEnded(state)) found.unshift(button("rollback", "Roll back to image", () => this.#rollBack(state, step)));
    return found;
  }

  async #rollBack(state, step) {
    find("loop-error").textContent = "";
    this.waiting(`Returning to image ${step.number + 1} after the current work`);
    try {
      await this.api.request(`/v1/loops/${state.id}/rollback`, { method: "POST", body: { step: step.number } });
    } catch (error) {
      find("loop-error").textContent = error.message;
    } finally {
      this.waiting(null);
    }
  }

  #branch(state, step) {
    const fields = [
      { name: "prompt", label: "Prompt", rows: 4, value: state.prompt },
      { name: "instruction", label: "Instruction for the next image; the controller's if empty", rows: 3, value: "" },
      { name: "seed", label: "Seed; random if empty", type: "number", value: "" },
    ];
    this.#open(`Branch from image ${step.number + 1}`, "Start branch", fields, async (values) => {
      const body = { step: step.number };
      if (values.prompt !== state.prompt) body.prompt = values.prompt;
      if (values.instruction.trim()) body.instruction = values.instruction.trim();
      if (values.seed.trim()) body.seed = Number(values.seed);
      const { id } = await this.api.json(`/v1/loops/${state.id}/branch`, { method: "POST", body });
      this.opened(id);
    });
  }

  #open(title, action, fields, apply) {
    this.apply = apply;
    find("edit-title").textContent = title;
    find("edit-apply").textContent = action;
    find("edit-apply").disabled = false;
    find("edit-error").textContent = find("edit-note").textContent = "";
    find("edit-fields").replaceChildren(...fields.map(({ name, label, rows, type, value }) => {
      const id = `edit-${name}`;
      const field = rows ? h("textarea", { id, name, rows })
        : h("input", { id, name, type, min: 0, max: MAX_SEED, step: 1, inputmode: "numeric" });
      field.value = value;
      return h("div", { class: "field" }, h("label", { for: id }, label), field);
    }));
    this.dialog.showModal();
  }

  async #submit() {
    const { apply } = this;
    const isOpen = () => this.apply === apply; // the dialog may be closed, and opened for something else, meanwhile
    const button = find("edit-apply");
    find("edit-error").textContent = "";
    find("edit-note").textContent = "A loop that runs changes after its current work.";
    button.disabled = true;
    try {
      await apply(Object.fromEntries(new FormData(this.form)));
      if (isOpen()) this.dialog.close();
    } catch (error) {
      (isOpen() ? find("edit-error") : find("loop-error")).textContent = error.message;
      this.#mark(isOpen() ? error.param : null);
    } finally {
      if (isOpen()) {
        button.disabled = false;
        find("edit-note").textContent = "";
      }
    }
  }

  /** Marks the field that the server refuses. */
  #mark(param) {
    for (const field of this.form.elements) field.removeAttribute("aria-invalid");
    const field = param && find(`edit-${param}`);
    if (!field) return;
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
}
