// Drives the real frontend of a running ComfyUI: node frontend.js URL JOBS.json RESULT.json
//
// A job is {name, refresh, settings, api | graph, ask, measure, geometry, picture, run, set, watch, timeout, frames}:
// load a workflow in API or UI format and take a picture. With run, press the page's button Run, wait (timeout seconds,
// 120 by default) for its end and take the picture then.
// set: {node type: {widget: value}} changes widgets before the run. watch: {type, previews, picture} takes a picture
// while a node of that type works, after so many live previews of its; "shown" has the pictures on it at the end (PNG,
// base64). The result tells per job what is wrong: nodes
// that the frontend does not know, marks as faulty, or that lost a link; and the previews counted by type.
// measure: the result has the graph in UI format and the size of each node, the larger of both designs of the nodes.
// refresh: read the lists of files again first, as the key R does.
// geometry: the result says for both designs what lies where it should not (geometry.js).
// settings: {setting: value} are set before the workflow is loaded. ask: a JavaScript expression whose value, taken
// before the run, is "answer". frames: {seconds, after: node type}: the page's animation frames over so many seconds,
// from the first live preview of such a node on, if it is named: then Run is pressed, and what runs is interrupted.
const { chromium } = require('playwright-core');
const { measure, geometry } = require('./geometry.js');
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
    window.previews = {};
    app.api.addEventListener('b_preview_with_metadata', event => {
      const id = event.detail.displayNodeId ?? event.detail.nodeId, type = app.graph.getNodeById(id)?.type;
      window.previews[type] = (window.previews[type] || 0) + 1;
    });
    for (const what of ['execution_success', 'execution_error', 'execution_interrupted']) {
      app.api.addEventListener(what, event => { window.ended = { event: what, detail: event.detail }; });
    }
  });
  return { page, close: async () => { await context.close(); fs.rmSync(profile, { recursive: true, force: true }); } };
}

async function fit(page) {
  await page.evaluate(() => { app.canvas.show_info = false; });
  await page.evaluate(() => app.extensionManager.command.execute('Comfy.Canvas.FitView'));
  await page.waitForTimeout(700);
}

// The design of the nodes: vue (Nodes 2.0) or the classic one, drawn on the canvas.
async function design(page, vue) {
  await page.evaluate(on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on), vue);
  await fit(page);
}

function larger(sizes, found) {
  const result = { ...sizes };
  for (const [id, [width, height]] of Object.entries(found)) {
    result[id] = [Math.max(width, result[id]?.[0] ?? 0), Math.max(height, result[id]?.[1] ?? 0)];
  }
  return result;
}

async function picture(page, file) {
  const canvas = await page.$('#graph-canvas');
  const options = file.endsWith('.jpg') ? { type: 'jpeg', quality: 70 } : {};
  options.timeout = 120000; // a page is not stable while its server has both cores
  await (canvas || page).screenshot({ path: file, ...options });
}

function change(widgets) {
  for (const node of app.graph._nodes) {
    for (const [name, value] of Object.entries(widgets[node.type] || {})) {
      node.widgets.find(widget => widget.name === name).value = value;
    }
  }
}

// The button is hidden in focus mode, which the pictures are taken in.
async function press(page) {
  const focus = () => page.evaluate(() => app.extensionManager.command.execute('Workspace.ToggleFocusMode'));
  await page.evaluate(() => { window.ended = null; window.previews = {}; });
  await focus();
  await page.getByTestId('queue-button').click();
  await focus();
}

async function run(page, seconds) {
  await press(page);
  const over = () => window.ended
    || Object.keys(app.lastNodeErrors || {}).length && { event: 'not queued', detail: app.lastNodeErrors };
  return page.waitForFunction(over, null, { timeout: seconds * 1000 })
    .then(end => end.jsonValue(), error => ({ event: 'timeout', detail: error.message }));
}

// The pictures on the nodes of a type, as PNG: elements in the new design, drawn on the canvas in the classic one.
function shown(type) {
  const vue = app.extensionManager.setting.get('Comfy.VueNodes.Enabled');
  const elements = node => [...document.querySelectorAll(`[data-node-id="${node.id}"] img`)];
  return app.graph._nodes.filter(node => node.type === type).flatMap(node => vue ? elements(node) : node.imgs || [])
    .map(image => {
      const copy = document.createElement('canvas');
      [copy.width, copy.height] = [image.naturalWidth, image.naturalHeight];
      copy.getContext('2d').drawImage(image, 0, 0);
      return copy.toDataURL('image/png').split(',')[1];
    });
}

// Runs in the page: the gaps between animation frames in ms, and from when to when (seconds since 1970).
function frames(seconds) {
  return new Promise(resolve => {
    const times = [], now = () => (performance.timeOrigin + performance.now()) / 1000, from = now();
    const frame = time => {
      times.push(time);
      if (now() < from + seconds) return requestAnimationFrame(frame);
      resolve({ from, to: now(), gaps: times.slice(1).map((time, i) => time - times[i]) });
    };
    requestAnimationFrame(frame);
  });
}

async function seen(page, type, previews, seconds) {
  const enough = ([name, count]) => (window.previews[name] || 0) >= count;
  await page.waitForFunction(enough, [type, previews], { timeout: seconds * 1000 });
}

async function watch(page, { type, previews, picture: file }, seconds) {
  await seen(page, type, previews, seconds);
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
    if (job.refresh) await page.evaluate(() => app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions'));
    for (const [name, value] of Object.entries(job.settings || {})) {
      await page.evaluate(([name, value]) => app.extensionManager.setting.set(name, value), [name, value]);
    }
    if (job.api) {
      await page.evaluate(([api, name]) => app.loadApiJson(api, name), [job.api, job.name]);
    } else {
      await page.evaluate(([graph, name]) => app.loadGraphData(graph, true, true, name), [job.graph, job.name]);
    }
    await page.waitForTimeout(800);
    await page.keyboard.press('Escape'); // "missing models": their files are not on the test machine
    await page.waitForTimeout(300);
    entry.nodes = await page.evaluate(() => app.graph._nodes.map(node => node.type));
    entry.faults = await page.evaluate(faults);
    await fit(page);
    if (job.ask) entry.answer = await page.evaluate(job.ask);
    for (const vue of job.measure || job.geometry ? [true, false] : []) {
      await design(page, vue);
      const found = await page.evaluate(job.measure ? measure : geometry);
      if (job.measure) entry.sizes = larger(entry.sizes, found);
      else entry.geometry = { ...entry.geometry, [vue ? 'new design' : 'classic design']: found };
    }
    if (job.measure) entry.graph = await page.evaluate(() => app.graph.serialize());
    if (job.set) await page.evaluate(change, job.set);
    if (job.run) {
      const seconds = job.timeout || 120, running = run(page, seconds);
      if (job.watch) await Promise.race([watch(page, job.watch, seconds), running]);
      entry.run = await running;
      entry.previews = await page.evaluate(() => window.previews);
      await page.waitForTimeout(3000); // the notes of the queue fade
      if (job.watch) entry.shown = await page.evaluate(shown, job.watch.type);
    }
    if (job.frames) {
      const { seconds, after } = job.frames;
      if (after) {
        await press(page);
        await seen(page, after, 1, job.timeout || 120);
      }
      entry.frames = await page.evaluate(frames, seconds);
      entry.previews = await page.evaluate(() => window.previews);
      if (after) await page.evaluate(() => app.api.interrupt(null));
    }
    if (job.picture) await picture(page, job.picture);
  }
  await close();
  fs.writeFileSync(result, JSON.stringify(results, null, 1));
})().catch(error => { console.error(error); process.exit(1); });
