// A KV pool at any step, and its picture: every block a strip of slots, real-time from the left, best-effort from the
// right. `data` is what `pool_data` of player.py packs.
const FIELDS = 7, KEY_EVERY = 32; // rt, rt index, rt fill, be, be index, be fill, overwritten

// The pool at a step: the changes up to it, from the nearest state kept on the way. Step -1 is the empty pool.
function poolReplay(data) {
  const kept = [new Int32Array(data.num_blocks * FIELDS)];
  for (let b = 0; b < data.num_blocks; b++) kept[0].set([-1, 0, 0, -1, 0, 0, 0], b * FIELDS);
  let pool = kept[0].slice(), at = -1;
  const apply = (changes) => {
    for (let i = 0; i < changes.length; i += FIELDS + 1)
      for (let f = 0; f < FIELDS; f++) pool[changes[i] * FIELDS + f] = changes[i + 1 + f];
  };
  const seek = (step) => {
    const base = Math.min(Math.floor((step + 1) / KEY_EVERY), kept.length - 1);
    let from = base * KEY_EVERY - 1;
    if (at <= step && at >= from) from = at;
    else pool = kept[base].slice();
    for (let s = from + 1; s <= step; s++) {
      apply(data.steps[s]);
      if ((s + 1) % KEY_EVERY === 0 && kept.length === (s + 1) / KEY_EVERY) kept.push(pool.slice());
    }
    at = step;
  };
  const view = (b) => pool.subarray(b * FIELDS, (b + 1) * FIELDS);
  const blockTable = (request) => {
    const mine = [];
    for (let b = 0; b < data.num_blocks; b++) {
      const v = view(b);
      if (v[0] === request) mine.push([v[1], b]);
      if (v[3] === request) mine.push([v[4], b]);
    }
    return mine.sort((p, q) => p[0] - q[0]).map((entry) => entry[1]);
  };
  return { seek, view, blockTable, step: () => at };
}

// Draws a pool into a canvas `width` pixels wide. `choose` is called with the request (an index into data.owners, or -1)
// of a clicked slot. It may be called again for the same canvas. `seen` holds the kinds that have been drawn so far.
const MAX_CELLS = 32, DIGIT_W = 5.5; // slots of a block that are drawn as cells; room for a digit
function poolMap(canvas, data, width, choose) {
  const replay = poolReplay(data), size = data.block_size, blocks = data.num_blocks, c = data.colours;
  const many = blocks > 400, gap = many ? 2 : 6, label = 4 + 6 * String(blocks - 1).length; // of many, each row's first
  const least = many ? 20 : 56 + label; // of a block
  const wanted = Math.round(Math.sqrt(blocks * (many ? 1 : 0.5)));
  const columns = Math.max(1, Math.min(blocks, wanted, Math.floor((width - gap) / least)));
  const before = (column) => (many ? label : (column + 1) * label);
  const strip = (width - gap - before(columns - 1)) / columns - gap, tall = Math.max(5, Math.min(16, strip / 4));
  const ctx = sized(canvas, width, Math.ceil(blocks / columns) * (tall + gap) + gap), seen = new Set();
  const fills = Object.fromEntries(Object.entries(data.looks).map(([kind, look]) => [kind, hatch(ctx, look)]));
  const corner = (b) => [gap + before(b % columns) + (b % columns) * (strip + gap), gap + Math.floor(b / columns) * (tall + gap)];

  // Of a block up to five runs of slots, as in `kv_blocks.slot_kinds`.
  const runs = (v) => {
    const rt = v[0] < 0 ? 0 : v[2], be = v[3] < 0 ? 0 : v[5], gone = v[3] < 0 ? 0 : v[6];
    const first = size - be, saved = Math.min(size, first + gone); // best-effort slots first..saved live on the host
    return [['free', rt, first], ['rt', 0, Math.min(rt, first)], ['over', first, Math.min(rt, saved)],
      ['lost', Math.max(first, rt), saved], ['be', Math.max(saved, first), size]];
  };
  const look = (kind, v) => (data.num_looks && 'rt be'.includes(kind) ? `request-${(kind === 'rt' ? v[0] : v[3]) % data.num_looks}` : kind);
  const fill = (kind, x, y, from, to) => {
    if (to <= from) return;
    seen.add(kind);
    ctx.fillStyle = fills[kind];
    ctx.fillRect(x + from * strip / size, y, (to - from) * strip / size, tall);
  };
  const onBlue = (kind) => !data.num_looks && (kind === 'rt' || kind === 'over');
  const cells = (v, x, y) => {
    if (size > MAX_CELLS || strip / size < 3) return;
    ctx.lineWidth = 0.7;
    for (const [kind, from, to] of runs(v)) {
      ctx.strokeStyle = onBlue(kind) ? c.cell_on_rt : c.cell; ctx.beginPath();
      for (let slot = Math.max(1, from); slot < to; slot++) { ctx.moveTo(x + slot * strip / size, y); ctx.lineTo(x + slot * strip / size, y + tall); }
      ctx.stroke();
    }
  };
  const numbers = (v, x, y) => { // of a block in which there is room for all
    const held = runs(v).filter(([kind, from, to]) => to > from && ['rt', 'over', 'be'].includes(kind));
    const tokenAt = (kind, slot) => (kind === 'be' ? v[4] * size + size - 1 - slot : v[1] * size + slot);
    const most = Math.max(0, ...held.flatMap(([kind, from, to]) => [tokenAt(kind, from), tokenAt(kind, to - 1)]));
    if (tall < 10 || strip / size < DIGIT_W * String(most).length + 2) return;
    ctx.font = '9px system-ui, sans-serif'; ctx.textAlign = 'center'; ctx.lineWidth = 2.4; ctx.lineJoin = 'round';
    for (const [kind, from, to] of held) {
      [ctx.fillStyle, ctx.strokeStyle] = onBlue(kind) ? [c.on_rt, c.rt] : [c.on_pale, c.halo];
      for (let slot = from; slot < to; slot++) {
        const token = String(tokenAt(kind, slot)), at = x + (slot + 0.5) * strip / size;
        ctx.strokeText(token, at, y + tall / 2 + 3.2); ctx.fillText(token, at, y + tall / 2 + 3.2);
      }
    }
  };
  const copied = (step) => {
    const copies = step < 0 ? [] : data.copies[step]; // block, kind, first slot, slots
    for (const bars of [false, true]) // bars last: a block that was saved may hold other tokens by now
      for (let i = 0; i < copies.length; i += 4) {
        const [x, y] = corner(copies[i]), [kind, from, count] = [data.kinds[copies[i + 1]], copies[i + 2], copies[i + 3]];
        if ((kind === 'saved') !== bars) continue;
        if (!bars) { fill(kind, x, y, from, from + count); continue; }
        seen.add(kind);
        ctx.fillStyle = c.on_pale; ctx.fillRect(x + from * strip / size, y + tall - 3, count * strip / size, 3);
      }
  };
  const draw = (step, chosen) => {
    replay.seek(step);
    ctx.fillStyle = c.paper; ctx.fillRect(0, 0, canvas.width, canvas.height);
    for (let b = 0; b < blocks; b++) {
      const [x, y] = corner(b), v = replay.view(b);
      for (const [kind, from, to] of runs(v)) fill(look(kind, v), x, y, from, to);
    }
    copied(step);
    for (let b = 0; b < blocks; b++) {
      const [x, y] = corner(b), v = replay.view(b), mine = chosen >= 0 && (v[0] === chosen || v[3] === chosen);
      cells(v, x, y);
      numbers(v, x, y);
      ctx.strokeStyle = mine ? c.ink : c.edge; ctx.lineWidth = mine ? 3 : 0.7;
      ctx.strokeRect(x, y, strip, tall);
      if (many && b % columns) continue;
      ctx.fillStyle = c.edge; ctx.font = '10px system-ui, sans-serif'; ctx.textAlign = 'right';
      ctx.fillText(String(b), x - 3, y + tall / 2 + 3.5);
    }
  };
  const under = (event) => {
    const [x, y] = within(canvas, event);
    const wide = strip + gap + (many ? 0 : label), row = Math.floor((y - gap / 2) / (tall + gap));
    const column = Math.floor((x - gap / 2 - (many ? label : 0)) / wide), b = row * columns + column;
    if (column < 0 || column >= columns || row < 0 || b >= blocks) return null;
    return [b, Math.max(0, Math.min(size - 1, Math.floor((x - corner(b)[0]) / strip * size)))];
  };
  // [request, token position] of each class that has a token for this slot; one that was overwritten is on the host.
  const rtAt = (v, slot) => (v[0] >= 0 && slot < v[2] ? [v[0], v[1] * size + slot] : null);
  const beAt = (v, slot) => (v[3] >= 0 && slot >= size - v[5] ? [v[3], v[4] * size + size - 1 - slot] : null);
  const says = ([b, slot]) => {
    const v = replay.view(b), [rt, be] = [rtAt(v, slot), beAt(v, slot)];
    const name = ([request, token]) => `${data.owners[request]}, token ${token}`;
    const onHost = be && slot < size - v[5] + v[6];
    if (rt) return onHost ? `${name(rt)}; over ${name(be)}, which is on the host` : name(rt);
    return be ? name(be) + (onHost ? ', on the host' : '') : 'free';
  };
  canvas.onpointermove = (event) => {
    const hit = under(event);
    canvas.title = hit ? `block ${hit[0]}, slot ${hit[1]}: ${says(hit)}` : '';
  };
  canvas.onclick = (event) => {
    const hit = under(event), v = hit && replay.view(hit[0]), owned = hit && (rtAt(v, hit[1]) || beAt(v, hit[1]));
    choose(owned ? owned[0] : -1);
  };
  const said = (request) => (request < 0 ? 'choose a request, or click a slot, to see a block table'
    : `block table of ${data.owners[request]}: ${replay.blockTable(request).join(', ') || 'empty'}`);
  return { draw, said, seen };
}
