// What is known about a loop, from its events. Pure functions: apply(state, event) changes nothing else.

/** Returns the state of a loop from the item of the API. */
export function initialState(item) {
  return {
    id: item.id, prompt: item.prompt, model: item.model, seed: item.seed, mode: item.mode, request: item.request,
    created: item.created, status: item.status, position: item.queue_position ?? null, outcome: item.outcome,
    error: item.error, requirements: null, plans: [], steps: [], history: [], best: null, budget: null, seconds: 0,
    activity: { kind: "queued" }, round: { first: 0, wanted: 0 }, reply: null, inferenceSteps: null, parent: item.parent ?? null,
    inherited: 0, edits: [],
  };
}

export const isEnded = (state) => !["queued", "running"].includes(state.status);

/** Applies an event of GET /v1/loops/{id}/events. */
export function apply(state, event) {
  handlers[event.type]?.(state, event);
  return state;
}

/** Replaces the steps by those of the stored trajectory, and takes over how the loop ended. */
export function complete(state, item) {
  Object.assign(state, {
    status: item.status, outcome: item.outcome, error: item.error, best: item.best ?? state.best, position: null,
    activity: { kind: "ended" }, seconds: item.seconds ?? state.seconds,
  });
  if (item.steps) state.steps = item.steps.map((step, number) => fromTrajectory(step, number));
  if (item.edits) state.edits = item.edits;
  return state;
}

const handlers = {
  queued: (state) => {
    state.activity = { kind: "queued" };
  },
  started: (state) => {
    state.status = "running";
    state.position = null;
    state.activity = { kind: state.mode === "one-shot" ? "generating" : "requirements" };
  },
  requirements: (state, event) => {
    state.requirements = event.requirements;
    if (!state.steps.length) state.activity = { kind: "planning" };
  },
  plan: (state, event) => {
    const reasoning = withoutAction(event.text);
    state.plans.push({ reasoning, attempt: event.attempt, error: event.error, verification: null });
    if (event.error === null) state.reply = { reasoning, attempts: event.attempt + 1 };
    state.activity = { kind: event.error === null ? "checking plan" : "planning", attempt: event.attempt + 1 };
  },
  plan_verification: (state, event) => {
    const plan = state.plans.findLast((each) => each.attempt === event.attempt && each.error === null);
    if (plan) plan.verification = event;
    state.activity = { kind: "planning", attempt: event.attempt + 1 };
  },
  generation_started: (state, event) => {
    const reasoning = withoutAction(event.text ?? "");
    const plan = state.steps.length === 0 ? state.plans.find((each) => each.reasoning === reasoning) : null;
    const isOfUser = state.edits.some((edit) => edit.instruction === reasoning);
    const attempts = plan ? plan.attempt + 1 : isOfUser ? 0 : state.reply?.attempts ?? 1;
    state.reply = { reasoning, attempts };
    state.inferenceSteps = event.num_inference_steps;
    state.round = { first: state.steps.length, wanted: event.images };
    state.activity = { kind: "generating", number: state.steps.length, images: event.images };
  },
  denoising_step: (state, event) => {
    state.activity = { kind: "generating", number: event.step, images: 1, done: event.done };
  },
  image: (state, event) => {
    state.steps[event.step] = {
      number: event.step, imageId: event.image_id, nfe: event.nfe, seconds: event.seconds, redraw: event.redraw,
      leftOut: event.left_out, reasoning: state.reply?.reasoning ?? "", attempts: state.reply?.attempts ?? 1,
      references: [...state.history], verification: null, rolledBack: false, seed: null,
    };
    state.seconds += event.seconds;
    const rest = state.round.first + state.round.wanted - state.steps.length;
    if (rest > 0) state.activity = { kind: "generating", number: state.steps.length, images: rest };
    else state.activity = { kind: state.mode === "one-shot" ? "ending" : "verifying", number: state.round.first };
  },
  budget: (state, event) => {
    state.budget = event;
  },
  verification: (state, event) => {
    const step = state.steps[event.step];
    if (!step) return;
    step.verification = event;
    const open = state.steps.find((each) => each.imageId && each.verification === null);
    if (open) {
      state.activity = { kind: "verifying", number: open.number };
      return;
    }
    // After an edit, images that are in the history already are verified again.
    if (state.round.wanted === 1 && event.step >= state.round.first && !state.history.includes(event.step)) {
      state.history.push(event.step);
    }
    state.activity = { kind: isAccepted(event) && !step.rolledBack ? "ending" : "deciding" };
  },
  selected: (state, event) => {
    for (const number of event.among) if (number !== event.step) state.steps[number].rolledBack = true;
    state.history = [...state.history.filter((number) => !event.among.includes(number)), event.step];
    const { verification } = state.steps[event.step];
    state.activity = { kind: verification && isAccepted(verification) ? "ending" : "deciding" };
  },
  rolled_back: (state, event) => {
    const length = state.history.indexOf(event.to) + 1;
    const dropped = state.history.slice(length);
    if (!dropped.length) return; // the user's rollback, which the event before it reports
    for (const number of dropped) state.steps[number].rolledBack = true;
    const again = state.steps[dropped[0]];
    if (again) state.reply = { reasoning: again.reasoning, attempts: again.attempts };
    state.history = state.history.slice(0, length);
    state.activity = { kind: "generating", number: state.steps.length, images: 1 };
  },
  decision: (state, event) => {
    if (event.error === null) state.reply = { reasoning: withoutAction(event.text), attempts: event.attempt + 1 };
    state.activity = { kind: event.error === null ? "ending" : "deciding" };
  },
  edited: (state, event) => {
    state.edits.push(event);
    if (event.rollback_to !== undefined) {
      const target = state.steps[event.rollback_to];
      for (const step of state.steps) step.rolledBack = (event.dropped ?? []).includes(step.number);
      state.history = [...target.references, target.number];
      state.round = { first: state.steps.length, wanted: 0 };
      state.activity = { kind: "deciding" };
      return;
    }
    if (event.requirements) {
      state.requirements = event.requirements;
      for (const step of state.steps) step.verification = null;
      if (!state.steps.length) state.plans = [];
    }
    const open = state.steps.find((each) => each.imageId && each.verification === null);
    state.activity = open ? { kind: "verifying", number: open.number } : { kind: state.steps.length ? "deciding" : "planning" };
  },
  branched: (state, event) => {
    Object.assign(state, {
      parent: { id: event.parent, step: event.step }, inherited: event.images,
      steps: event.steps.map((step, number) => fromTrajectory(step, number)), history: event.steps.map((_, number) => number),
      edits: event.instruction ? [{ step: event.images, instruction: event.instruction }] : [],
      activity: { kind: "deciding" },
    });
  },
  best: (state, event) => {
    state.best = event.step;
  },
  done: (state, event) => {
    Object.assign(state, { status: event.status, outcome: event.outcome ?? null, error: event.error ?? state.error });
    state.best = event.best ?? state.best;
    state.activity = { kind: "ended" };
  },
};

/** Expected number of met requirements. */
export function expectation(verification) {
  const each = ({ probability, met }) => (probability === null ? Number(met === true) : probability);
  return verification.requirements.reduce((sum, requirement) => sum + each(requirement), 0);
}

export const isAccepted = (verification) =>
  verification.requirements.length > 0 && verification.requirements.every((each) => each.met === true);

export const unmetTexts = (verification) =>
  verification.requirements.filter((each) => each.met !== true).map((each) => each.text);

export const withoutAction = (text) =>
  text.replace(/<\|(?:image_gen|terminate|im_end|endoftext)\|>/g, "").trim();

function fromTrajectory(step, number) {
  return {
    number, imageId: step.image_id, nfe: step.nfe, seconds: step.seconds, redraw: step.redraw, leftOut: step.left_out,
    reasoning: step.reasoning, attempts: step.attempts, references: step.references, verification: step.verification,
    rolledBack: step.rolled_back, seed: step.seed,
  };
}
