// Walks through the pack as a stranger does, by mouse and keyboard, and takes a picture of each step:
// node walk.js URL FOLDER [STEP ...]
//
// Nothing is called in the page but what a click calls; only the ends of runs are listened to.
const { chromium } = require('playwright-core');
const fs = require('fs'), os = require('os'), path = require('path');
const [url, folder, ...wanted] = process.argv.slice(2);
const ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];
const LOCAL = ['127.0.0.1', 'localhost'];
const MINUTE = 60000;

async function open() {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'chrome-'));
  const context = await chromium.launchPersistentContext(profile, {
    headless: true, executablePath: process.env.CHROMIUM || '/usr/bin/chromium', viewport: { width: 1400, height: 800 },
    args: ARGS });
  const allowed = request => LOCAL.includes(new URL(request.url()).hostname) || /^(data|blob):/.test(request.url());
  await context.route('**/*', route => allowed(route.request()) ? route.continue() : route.abort());
  const page = await context.newPage();
  page.setDefaultTimeout(MINUTE);
  await page.goto(url);
  await page.waitForFunction(
    () => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types || {}).length > 100, null,
    { timeout: 2 * MINUTE });
  await page.waitForTimeout(3000);
  await page.evaluate(() => {
    window.ended = [];
    for (const what of ['execution_success', 'execution_error', 'execution_interrupted']) {
      app.api.addEventListener(what, () => window.ended.push(what));
    }
  });
  return { page, close: async () => { await context.close(); fs.rmSync(profile, { recursive: true, force: true }); } };
}

const shot = (page, name) => page.screenshot({ path: path.join(folder, `${name}.jpg`), type: 'jpeg', quality: 60 });

async function template(page, name, picture) {
  const dialog = page.getByTestId('template-workflows-content');
  if (!await dialog.isVisible()) await page.getByRole('button', { name: 'Templates' }).first().click();
  await page.getByText('turbo-distill', { exact: true }).first().click();
  const card = page.getByTestId(`template-workflow-${name}`);
  await card.scrollIntoViewIfNeeded();
  await page.waitForTimeout(2500);
  if (picture) await shot(page, picture);
  await card.click();
  await dialog.waitFor({ state: 'hidden' });
  await page.waitForTimeout(2500);
}

async function run(page, minutes, picture) {
  const before = await page.evaluate(() => window.ended.length);
  await page.getByTestId('queue-button').click();
  if (picture) { // once the trainer shows a picture of its own
    await page.waitForFunction(() => app.graph._nodes.some(node => node.type.endsWith('Trainer') && node.imgs?.length), null,
      { timeout: minutes * MINUTE });
    await page.waitForTimeout(15000);
    await shot(page, picture);
  }
  await page.waitForFunction(count => window.ended.length > count, before, { timeout: minutes * MINUTE });
  const end = await page.evaluate(() => window.ended.at(-1));
  if (end !== 'execution_success') throw new Error(`the run ended with ${end}`);
  await page.waitForTimeout(6000); // the notes of the queue fade
}

// Brings the nodes with these titles into view, as a wheel and a drag would.
async function look(page, titles) {
  await page.evaluate(names => {
    const nodes = app.graph._nodes.filter(node => names.includes(node.title));
    if (!nodes.length) throw new Error(`no node is called ${names}`);
    app.canvas.selectItems(nodes);
  }, titles);
  await page.mouse.move(700, 700);
  await page.keyboard.press('.'); // Fit View goes to what is selected
  await page.waitForTimeout(1500);
  await page.evaluate(() => app.canvas.deselectAll());
  await page.waitForTimeout(500);
}

const STEPS = {
  async first(page) {
    await template(page, 'sample_mini', '1-templates');
    await shot(page, '2-opened');
    await run(page, 5);
    await shot(page, '3-first-pictures');
  },
  async distil(page) {
    await template(page, 'distil_mini_ladd');
    await look(page, ['How to use this']);
    await shot(page, '4-note');
    await page.keyboard.press('Escape');
    await look(page, ['1. Teacher Latents', '2. LADD Trainer', '3. Save Turbo LoRA', 'report of the run']);
    await run(page, 40, '5-training');
    await look(page, ['2. LADD Trainer', '3. Save Turbo LoRA', 'report of the run']);
    await shot(page, '6-report');
    await look(page, ["teacher's pictures", "student's pictures"]);
    await shot(page, '7-teacher-and-student');
  },
  async own(page) {
    await template(page, 'own_pictures');
    await run(page, 40);
    await look(page, ['1. Picture Folder', '2. LADD Trainer']);
    await shot(page, '8-own-pictures');
    await look(page, ["teacher's pictures", "student's pictures"]);
    await shot(page, '8-own-student');
  },
  async ksampler(page) {
    await template(page, 'lora_in_ksampler');
    await page.mouse.move(700, 700);
    await page.keyboard.press('r');
    await page.waitForTimeout(3000);
    await run(page, 5);
    await look(page, ['KSampler', 'what the preset chose', 'Save Image']);
    await shot(page, '9-ksampler');
  },
};

(async () => {
  const { page, close } = await open();
  for (const [name, step] of Object.entries(STEPS)) {
    if (wanted.length && !wanted.includes(name)) continue;
    console.log(name);
    await step(page).catch(async error => { await shot(page, 'failed'); throw error; });
  }
  await close();
})().catch(error => { console.error(error); process.exit(1); });
