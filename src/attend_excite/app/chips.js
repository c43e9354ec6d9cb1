// The words of a prompt as buttons, and a strength for each that is chosen. Built with textContent alone:
// a prompt can come from anyone's link.
const chips = element.querySelector(".ae-chips");
const subjects = element.querySelector(".ae-subjects");
const note = element.querySelector(".ae-note");

function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function change(index, changes) {
  const click = { ...changes, clicked_in: props.value.prompt || " " };
  const words = props.value.words.map((word, at) => (at === index ? { ...word, ...click } : word));
  props.value = { ...props.value, words };
}

function titleOf(word) {
  if (word.unread) return "The model has never read this word, so it cannot draw it";
  if (word.pieces.length > 1) return `The model reads ${word.pieces.length} tokens: ${word.pieces.join(", ")}`;
  return "";
}

function chip(word, index, colour) {
  const pieces = word.pieces.flatMap((piece, at) => (at ? [make("i", { textContent: "|" }), piece] : [piece]));
  if (!word.name) {
    return make("span", { className: word.pieces.length ? "ae-mark" : "ae-mark ae-cut", textContent: word.text });
  }
  const button = make("button", { type: "button", className: "ae-chip" }, ...pieces);
  button.dataset.key = `chip ${index}`;
  button.setAttribute("aria-pressed", word.chosen);
  button.title = titleOf(word);
  if (word.unread) button.dataset.unread = "";
  if (word.chosen) button.dataset.subject = colour;
  if (word.negated) button.dataset.negated = "";
  button.onclick = () => {
    change(index, { chosen: !word.chosen, negated: false, target: 1 });
    show();
  };
  return button;
}

function strength(word, index, colour) {
  const wanted = make("output", {});
  const tell = (target) => {
    const percent = `${Math.round(100 * target)} %`;
    wanted.textContent = word.negated
      ? target === 0 ? "not at all" : `at most ${percent}`
      : target === 1 ? "fully" : `at least ${percent}`;
  };
  tell(word.target);
  const range = make("input", { type: "range", min: 0, max: 1, step: 0.05, value: word.target });
  range.dataset.key = `range ${index}`;
  range.title = "How much attention the word is to get";
  range.setAttribute("aria-label", `attention to ${word.name}, ${word.negated ? "at most" : "at least"}`);
  range.oninput = () => {
    tell(range.valueAsNumber);
    change(index, { target: range.valueAsNumber });
  };
  const negate = make("select", { className: "ae-negate" });
  for (const [text, chosen] of [["show", false], ["avoid", true]]) {
    negate.append(make("option", { textContent: text, selected: chosen === word.negated }));
  }
  negate.dataset.key = `negate ${index}`;
  negate.setAttribute("aria-label", `${word.name}: show or avoid`);
  negate.onchange = () => {
    const negated = negate.value === "avoid";
    change(index, { negated, target: negated ? 0 : 1 });
    show();
  };
  const row = make("li", {}, make("b", { textContent: word.name }), negate, range, wanted);
  row.dataset.subject = colour;
  if (word.negated) row.dataset.negated = "";
  return row;
}

function show() {
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const words = props.value?.words ?? [];
  let chosen = 0;
  const colours = words.map((word) => (word.chosen ? chosen++ % 6 : null));
  chips.replaceChildren(...words.map((word, index) => chip(word, index, colours[index])));
  const rows = words.map((word, index) => (word.chosen ? strength(word, index, colours[index]) : null));
  subjects.replaceChildren(...rows.filter(Boolean));
  note.textContent = props.value?.note ?? "";
  if (focused) element.querySelector(`[data-key="${focused}"]`)?.focus();
}

watch("value", show);
show();
