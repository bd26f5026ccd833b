// What frontend.js asks the page about the places of nodes and links. These functions run in the page.

// {node id: [width, height]} with the title, as the shown design of the nodes needs it.
function measure() {
  const vue = app.extensionManager.setting.get('Comfy.VueNodes.Enabled'), sizes = {};
  for (const node of app.graph._nodes) {
    const [width, height] = vue ? node.size : node.computeSize();
    sizes[node.id] = [width, height + LiteGraph.NODE_TITLE_HEIGHT];
  }
  return sizes;
}

// Texts that say which nodes overlap, which links run behind a node, and which nodes lie across the edge of a group.
function geometry() {
  const title = LiteGraph.NODE_TITLE_HEIGHT, found = [];
  const boxes = app.graph._nodes.map(node => {
    const [x, y] = node.pos, [width, height] = node.size;
    return { id: node.id, name: `${node.id} ${node.title}`, left: x, top: y - title, right: x + width, bottom: y + height };
  });
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => apart(a, b) || found.push(`${a.name} overlaps ${b.name}`)));

  for (const group of app.graph._groups) {
    const [left, top, width, height] = group._bounding, area = { left, top, right: left + width, bottom: top + height };
    for (const box of boxes) {
      const inside = box.left >= area.left && box.right <= area.right && box.top >= area.top && box.bottom <= area.bottom;
      if (!inside && !apart(box, area)) found.push(`${box.name} lies across the edge of the group ${group.title}`);
    }
  }

  // A link's drawn line crosses a node if some point of the node's edge lies on it.
  const pen = document.createElement('canvas').getContext('2d'), step = 4;
  pen.lineWidth = 2 * step;
  const edge = ({ left, top, right, bottom }) => {
    const points = [];
    for (let x = left; x <= right; x += step) points.push([x, top], [x, bottom]);
    for (let y = top; y <= bottom; y += step) points.push([left, y], [right, y]);
    return points;
  };
  const edges = boxes.map(box => [box, edge(box)]);
  const crossed = (path, own) => edges.filter(([box, points]) =>
    !own.includes(box.id) && points.some(([x, y]) => pen.isPointInStroke(path, x, y))).map(([box]) => box.name);
  let lines = 0;
  for (const link of app.graph.links.values()) {
    const way = [];
    for (let at = app.graph.reroutes.get(link.parentId); at; at = app.graph.reroutes.get(at.parentId)) way.unshift(at);
    [...way, link].forEach((part, i) => {
      const own = [i === 0 && link.origin_id, part === link && link.target_id];
      if (!part.path) found.push(`a part of link ${link.id} was not drawn`);
      else for (const name of crossed(part.path, own)) {
        found.push(`the link from ${link.origin_id} to ${link.target_id} runs behind ${name}`);
      }
      lines++;
    });
  }
  return { nodes: boxes.length, lines, found: [...new Set(found)] };
}

module.exports = { measure, geometry };
