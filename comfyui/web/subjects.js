// The node Subjects: its text as it was read, each subject a chip in it, once the node has run.
import { app } from "../../scripts/app.js";

const COLOURS = ["#e4572e", "#4f7cac", "#6a994e", "#b56576", "#8f6bb3", "#c98a1b"];

function chip(text, subject) {
  const span = document.createElement("span");
  span.textContent = text;
  if (subject !== null) {
    span.className = "attend-excite-subject";
    span.style.cssText = `background: ${COLOURS[subject % COLOURS.length]}; color: #fff; border-radius: 4px; padding: 0 4px;`;
  }
  return span;
}

app.registerExtension({
  name: "attend-excite.subjects",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "AttendExciteSubjects") return;
    const created = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function () {
      created?.apply(this, arguments);
      const shown = document.createElement("div");
      shown.style.cssText = "font-size: 13px; line-height: 1.6; overflow-y: auto; white-space: pre-wrap; padding: 4px;";
      shown.textContent = "Run once to see which subjects are found.";
      this.attendExciteShown = shown;
      // What is shown is no input: it is kept out of what is sent to be run, and out of the workflow.
      const options = { serialize: false, getMinHeight: () => 60 };
      this.addDOMWidget("found", "attend-excite-found", shown, options).serialize = false;
    };
    const executed = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      executed?.apply(this, arguments);
      const pieces = output?.pieces?.[0] ?? [];
      this.attendExciteShown?.replaceChildren(...pieces.map(([text, subject]) => chip(text, subject)));
    };
  },
});
