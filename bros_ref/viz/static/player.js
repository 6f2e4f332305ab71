// Plays a KV pool: every block a strip of slots, real-time from the left, best-effort from the right. `root` holds the
// controls and, as JSON, what `player.py` packs. No kernel and no network are needed.
function play(root) {
  root.dataset.ready = 'yes';
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const [canvas, slider] = [root.querySelector('canvas'), root.querySelector('input')];
  const [button, speed] = [root.querySelector('button'), root.querySelector('select')];
  const [status, detail] = root.querySelectorAll('[role=status]');
  const ctx = canvas.getContext('2d'), size = data.block_size, blocks = data.num_blocks, last = data.steps.length - 1;
  const FIELDS = 7, KEY_EVERY = 32; // rt, rt index, rt fill, be, be index, be fill, overwritten

  // 1. The pool at a step: the changes up to it, from the nearest state kept on the way.
  const kept = [new Int32Array(blocks * FIELDS)];
  for (let b = 0; b < blocks; b++) kept[0].set([-1, 0, 0, -1, 0, 0, 0], b * FIELDS);
  const apply = (pool, step) => {
    const changes = data.steps[step];
    for (let i = 0; i < changes.length; i += FIELDS + 1)
      for (let f = 0; f < FIELDS; f++) pool[changes[i] * FIELDS + f] = changes[i + 1 + f];
  };
  let pool = null, at = -1;
  const seek = (step) => {
    const base = Math.min(Math.floor((step + 1) / KEY_EVERY), kept.length - 1);
    let from = base * KEY_EVERY - 1;
    if (pool !== null && at <= step && at >= from) from = at;
    else pool = kept[base].slice();
    for (let s = from + 1; s <= step; s++) {
      apply(pool, s);
      if ((s + 1) % KEY_EVERY === 0 && kept.length === (s + 1) / KEY_EVERY) kept.push(pool.slice());
    }
    at = step;
  };
  const view = (b) => pool.subarray(b * FIELDS, (b + 1) * FIELDS);

  // 2. Geometry, and fills that differ by pattern as well as by colour.
  const width = 760, gap = blocks > 400 ? 2 : 6;
  const columns = Math.max(1, Math.min(blocks, Math.round(Math.sqrt(blocks * (blocks > 400 ? 1 : 0.5)))));
  const strip = (width - gap) / columns - gap, tall = Math.max(5, Math.min(16, strip / 4));
  canvas.width = width;
  canvas.height = Math.ceil(blocks / columns) * (tall + gap) + gap;
  const hatch = (fill, stroke, lines) => {
    const tile = document.createElement('canvas'), pen = tile.getContext('2d');
    tile.width = tile.height = 6;
    pen.fillStyle = fill; pen.fillRect(0, 0, 6, 6);
    pen.strokeStyle = stroke; pen.lineWidth = 1.2; pen.beginPath();
    for (const [x, y, u, v] of lines) { pen.moveTo(x, y); pen.lineTo(u, v); }
    pen.stroke();
    return ctx.createPattern(tile, 'repeat');
  };
  const slash = [[-1, 7, 7, -1]], cross = [[1, 1, 5, 5], [5, 1, 1, 5]], c = data.colours;
  const fills = { rt: c.rt, be: hatch(c.be, '#8a5200', slash), over: hatch(c.rt, '#ffffff', cross),
    lost: hatch('#ffffff', c.lost, cross), free: c.free };
  const corner = (b) => [gap + (b % columns) * (strip + gap), gap + Math.floor(b / columns) * (tall + gap)];
  let chosen = -1; // index of the request whose blocks are outlined

  // 3. Drawing: of each block up to five runs of slots, as in `kv_blocks.slot_kinds`.
  const runs = (v) => {
    const rt = v[0] < 0 ? 0 : v[2], be = v[3] < 0 ? 0 : v[5], gone = v[3] < 0 ? 0 : v[6];
    const first = size - be, saved = Math.min(size, first + gone); // best-effort slots first..saved live on the host
    return [['rt', 0, Math.min(rt, first)], ['over', first, Math.min(rt, saved)], ['lost', Math.max(first, rt), saved],
      ['be', Math.max(saved, first), size]];
  };
  const draw = () => {
    ctx.fillStyle = c.paper; ctx.fillRect(0, 0, canvas.width, canvas.height);
    for (let b = 0; b < blocks; b++) {
      const [x, y] = corner(b), v = view(b);
      ctx.fillStyle = fills.free; ctx.fillRect(x, y, strip, tall);
      for (const [kind, from, to] of runs(v)) {
        if (to <= from) continue;
        ctx.fillStyle = fills[kind];
        ctx.fillRect(x + from * strip / size, y, (to - from) * strip / size, tall);
      }
      const mine = chosen >= 0 && (v[0] === chosen || v[3] === chosen);
      ctx.strokeStyle = mine ? c.ink : c.edge; ctx.lineWidth = mine ? 2.5 : 0.7;
      ctx.strokeRect(x, y, strip, tall);
    }
    status.textContent = `step ${at + 1} of ${last + 1}, ${data.notes[at]}`;
    root.dataset.step = at;
    if (chosen >= 0) detail.textContent = table();
  };
  const table = () => {
    const mine = [];
    for (let b = 0; b < blocks; b++) {
      const v = view(b);
      if (v[0] === chosen) mine.push([v[1], b]);
      if (v[3] === chosen) mine.push([v[4], b]);
    }
    const list = mine.sort((p, q) => p[0] - q[0]).map((entry) => entry[1]).join(', ') || 'empty';
    return `block table of ${data.owners[chosen]}: ${list}`;
  };

  // 4. What one can do: move, play, point, click.
  let queued = false, timer = null;
  const show = () => {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => { queued = false; seek(Number(slider.value)); draw(); });
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = 'play'; };
  slider.addEventListener('input', show);
  button.addEventListener('click', () => {
    if (timer !== null) { stop(); return; }
    if (Number(slider.value) >= last) slider.value = 0;
    button.textContent = 'pause';
    timer = setInterval(() => {
      if (Number(slider.value) >= last) { stop(); return; }
      slider.value = Number(slider.value) + 1; show();
    }, 1000 / Number(speed.value));
  });
  speed.addEventListener('change', () => { if (timer !== null) { stop(); button.click(); } });
  const under = (event) => {
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const column = Math.floor((x - gap / 2) / (strip + gap)), row = Math.floor((y - gap / 2) / (tall + gap));
    const b = row * columns + column;
    if (column < 0 || column >= columns || row < 0 || b >= blocks) return null;
    return [b, Math.max(0, Math.min(size - 1, Math.floor((x - corner(b)[0]) / strip * size)))];
  };
  const owner = (v, slot) => { // [request, token position] of what a slot holds
    if (v[0] >= 0 && slot < v[2]) return [v[0], v[1] * size + slot];
    if (v[3] >= 0 && slot >= size - v[5]) return [v[3], v[4] * size + size - 1 - slot];
    return null;
  };
  canvas.addEventListener('pointermove', (event) => {
    const hit = under(event), owned = hit && owner(view(hit[0]), hit[1]);
    if (hit) canvas.title = `block ${hit[0]}, slot ${hit[1]}: ${owned ? `${data.owners[owned[0]]}, token ${owned[1]}` : 'free'}`;
  });
  canvas.addEventListener('click', (event) => {
    const hit = under(event), owned = hit && owner(view(hit[0]), hit[1]);
    chosen = owned ? owned[0] : -1;
    detail.textContent = owned ? table() : 'click a slot to see its request\'s block table';
    draw();
  });
  seek(Number(slider.value)); draw();
}
for (const root of document.querySelectorAll('[data-bros-player]:not([data-ready])')) play(root);
