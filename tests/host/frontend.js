// Drives the real frontend of a running ComfyUI: node frontend.js URL JOBS.json RESULT.json
//
// A job is {name, api | graph, save, picture, run, set, watch, timeout}: load a workflow in API or UI format, save it in
// UI format, take a picture, and, with run, queue it, wait (timeout seconds, 120 by default) for its end and take the
// picture then. set: {node type: {widget: value}} changes widgets before the run. watch: {type, previews, picture} takes
// a picture while a node of that type works, after so many live previews of its. The result tells per job what is
// wrong: nodes that the frontend does not know, marks as faulty, or that lost a link; and the previews counted by type.
const { chromium } = require('playwright-core');
const fs = require('fs'), os = require('os'), path = require('path');
const ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];
const LOCAL = ['127.0.0.1', 'localhost'];

async function open(url) {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'chrome-'));
  const context = await chromium.launchPersistentContext(profile, {
    headless: true, executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
    viewport: { width: 1800, height: 800 }, args: ARGS });
  const allowed = request => LOCAL.includes(new URL(request.url()).hostname) || /^(data|blob):/.test(request.url());
  await context.route('**/*', route => allowed(route.request()) ? route.continue() : route.abort());
  const page = await context.newPage();
  await page.goto(url);
  await page.waitForFunction(
    () => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types || {}).length > 100, null,
    { timeout: 120000 });
  await page.waitForTimeout(1500);
  await page.keyboard.press('Escape'); // the dialog of the first start
  await page.waitForTimeout(500);
  await page.evaluate(() => {
    app.canvas.min_font_size_for_lod = 0; // texts also on small nodes
    app.canvas.low_quality_zoom_threshold = 0;
    app.extensionManager.command.execute('Workspace.ToggleFocusMode');
  });
  return { page, close: async () => { await context.close(); fs.rmSync(profile, { recursive: true, force: true }); } };
}

// Columns by distance from the sources, wide enough for the nodes: graph.arrange() alone lets tall nodes overlap.
function layOut() {
  const depth = new Map(), nodes = app.graph._nodes;
  const depthOf = node => {
    if (!depth.has(node.id)) {
      const sources = (node.inputs || []).filter(i => i.link != null).map(i => app.graph.getNodeById(app.graph.links[i.link]?.origin_id ?? app.graph.links.get(i.link).origin_id));
      depth.set(node.id, sources.length ? 1 + Math.max(...sources.map(depthOf)) : 0);
    }
    return depth.get(node.id);
  };
  nodes.forEach(depthOf);
  let x = 40;
  for (let column = 0; column <= Math.max(...depth.values()); column++) {
    const members = nodes.filter(node => depth.get(node.id) === column);
    let y = 60, width = 0;
    for (const node of members) {
      const size = node.computeSize();
      node.size = [Math.max(size[0], 270), Math.max(size[1], node.type.includes('TextEncode') ? 150 : 0)];
      if (['PreviewImage', 'SaveImage', 'LoadImage', 'PreviewAny'].includes(node.type)) node.size = [340, 380];
      if (node.type.endsWith('Trainer')) node.size = [340, size[1] + 240]; // room for its live preview
      node.pos = [x, y];
      y += node.size[1] + 70; width = Math.max(width, node.size[0]);
    }
    x += width + 60;
  }
  app.graph.setDirtyCanvas(true, true);
}

async function fit(page) {
  await page.evaluate(() => { app.canvas.show_info = false; });
  await page.evaluate(() => app.extensionManager.command.execute('Comfy.Canvas.FitView'));
  await page.waitForTimeout(1200);
}

async function picture(page, file) {
  const canvas = await page.$('#graph-canvas');
  const options = file.endsWith('.jpg') ? { type: 'jpeg', quality: 70 } : {};
  await (canvas || page).screenshot({ path: file, ...options });
}

function change(widgets) {
  for (const node of app.graph._nodes) {
    for (const [name, value] of Object.entries(widgets[node.type] || {})) {
      node.widgets.find(widget => widget.name === name).value = value;
    }
  }
}

async function run(page, seconds) {
  return page.evaluate(limit => new Promise(resolve => {
    const done = what => event => resolve({ event: what, detail: event.detail });
    window.previews = {};
    app.api.addEventListener('b_preview_with_metadata', event => {
      const id = event.detail.displayNodeId ?? event.detail.nodeId, type = app.graph.getNodeById(id)?.type;
      window.previews[type] = (window.previews[type] || 0) + 1;
    });
    for (const what of ['execution_success', 'execution_error', 'execution_interrupted']) {
      app.api.addEventListener(what, done(what));
    }
    setTimeout(() => resolve({ event: 'timeout' }), limit * 1000);
    app.queuePrompt(0, 1).then(ok => ok === false && resolve({ event: 'not queued', detail: app.lastNodeErrors }));
  }), seconds);
}

async function watch(page, { type, previews, picture: file }, seconds) {
  const shown = ([name, count]) => (window.previews?.[name] || 0) >= count;
  await page.waitForFunction(shown, [type, previews], { timeout: seconds * 1000 });
  await page.waitForTimeout(500);
  await picture(page, file);
}

function faults() {
  const found = [];
  for (const node of app.graph._nodes) {
    if (!LiteGraph.registered_node_types[node.type]) found.push(`${node.type}: unknown to the frontend`);
    if (node.has_errors) found.push(`${node.type}: marked as faulty`);
    for (const input of node.inputs || []) {
      const optional = input.widget || input.shape === 7;
      if (input.link == null && !optional) found.push(`${node.type}.${input.name}: not connected`);
    }
  }
  return found;
}

(async () => {
  const [url, jobs, result] = process.argv.slice(2);
  const { page, close } = await open(url);
  const results = [];
  page.on('pageerror', error => results.at(-1)?.errors.push(error.message));
  for (const job of JSON.parse(fs.readFileSync(jobs))) {
    const entry = { name: job.name, errors: [] };
    results.push(entry);
    if (job.api) {
      await page.evaluate(([api, name]) => app.loadApiJson(api, name), [job.api, job.name]);
      await page.waitForTimeout(400);
      await page.evaluate(layOut);
    } else {
      await page.evaluate(([graph, name]) => app.loadGraphData(graph, true, true, name), [job.graph, job.name]);
    }
    await page.waitForTimeout(800);
    await page.keyboard.press('Escape'); // "missing models": their files are not on the test machine
    await page.waitForTimeout(300);
    entry.nodes = await page.evaluate(() => app.graph._nodes.map(node => node.type));
    entry.faults = await page.evaluate(faults);
    await fit(page);
    if (job.save) fs.writeFileSync(job.save, JSON.stringify(await page.evaluate(() => app.graph.serialize()), null, 1) + '\n');
    if (job.set) await page.evaluate(change, job.set);
    if (job.run) {
      const seconds = job.timeout || 120, running = run(page, seconds);
      if (job.watch) await Promise.race([watch(page, job.watch, seconds), running]);
      entry.run = await running;
      entry.previews = await page.evaluate(() => window.previews);
      await page.waitForTimeout(5000); // the notes of the queue fade
    }
    if (job.picture) await picture(page, job.picture);
  }
  await close();
  fs.writeFileSync(result, JSON.stringify(results, null, 1));
})().catch(error => { console.error(error); process.exit(1); });
