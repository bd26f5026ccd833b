// The frontend's Nodes 2.0 hides widgets that a node calls advanced until they are asked for. Its classic design knows
// how to ("Show Advanced" in the menu of a node), but does not read what the node says, and would leave gaps. So for the
// nodes of this pack the widgets are hidden here: all that are advanced and not linked, until they are asked for.
// The setting "Always show advanced widgets" shows them in both designs.
import { app } from "../../../scripts/app.js";

const SETTING = "Comfy.Node.AlwaysShowAdvancedWidgets";

function isAsked(node, widget) {
  const linked = node.inputs?.find((input) => input.widget?.name === widget.name)?.link != null;
  return linked || node.showAdvanced || app.extensionManager?.setting?.get(SETTING);
}

function fold(node, widget, owner) {
  let hidden = widget.hidden;
  widget.advanced = true; // so that the menu has "Show Advanced"
  Object.defineProperty(widget, "hidden", {
    configurable: true,
    enumerable: true,
    get: () => hidden || !isAsked(node, owner),
    set: (value) => { hidden = value; },
  });
}

app.registerExtension({
  name: "turbo-distill.first-look",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("TurboDistill")) return;
    for (const owner of node.widgets ?? []) {
      if (!owner.options?.advanced) continue;
      for (const widget of [owner, ...(owner.linkedWidgets ?? [])]) fold(node, widget, owner);
    }
    if (node.widgets?.some((widget) => widget.advanced)) node.setSize([node.size[0], node.computeSize()[1]]);
  },
});
