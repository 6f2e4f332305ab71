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

// Draws a pool into a canvas. `choose` is called with the request (an index into data.owners, or -1) of a clicked slot.
function poolMap(canvas, data, width, choose) {
  const replay = poolReplay(data), size = data.block_size, blocks = data.num_blocks, c = data.colours;
  const gap = blocks > 400 ? 2 : 6;
  const columns = Math.max(1, Math.min(blocks, Math.round(Math.sqrt(blocks * (blocks > 400 ? 1 : 0.5)))));
  const strip = (width - gap) / columns - gap, tall = Math.max(5, Math.min(16, strip / 4));
  const ctx = sized(canvas, width, Math.ceil(blocks / columns) * (tall + gap) + gap);
  const fills = Object.fromEntries(Object.entries(data.looks).map(([kind, look]) => [kind, hatch(ctx, look)]));
  const corner = (b) => [gap + (b % columns) * (strip + gap), gap + Math.floor(b / columns) * (tall + gap)];

  // Of a block up to five runs of slots, as in `kv_blocks.slot_kinds`.
  const runs = (v) => {
    const rt = v[0] < 0 ? 0 : v[2], be = v[3] < 0 ? 0 : v[5], gone = v[3] < 0 ? 0 : v[6];
    const first = size - be, saved = Math.min(size, first + gone); // best-effort slots first..saved live on the host
    return [['rt', 0, Math.min(rt, first)], ['over', first, Math.min(rt, saved)], ['lost', Math.max(first, rt), saved],
      ['be', Math.max(saved, first), size]];
  };
  const fill = (kind, x, y, from, to) => {
    if (to <= from) return;
    ctx.fillStyle = fills[kind];
    ctx.fillRect(x + from * strip / size, y, (to - from) * strip / size, tall);
  };
  const draw = (step, chosen) => {
    replay.seek(step);
    ctx.fillStyle = c.paper; ctx.fillRect(0, 0, canvas.width, canvas.height);
    for (let b = 0; b < blocks; b++) {
      const [x, y] = corner(b);
      fill('free', x, y, 0, size);
      for (const [kind, from, to] of runs(replay.view(b))) fill(kind, x, y, from, to);
    }
    const copies = step < 0 ? [] : data.copies[step]; // block, kind, first slot, slots
    for (const bars of [false, true]) // bars last: a block that was saved may hold other tokens by now
      for (let i = 0; i < copies.length; i += 4) {
        const [x, y] = corner(copies[i]), [kind, from, count] = [data.kinds[copies[i + 1]], copies[i + 2], copies[i + 3]];
        if ((kind === 'saved') !== bars) continue;
        if (!bars) { fill(kind, x, y, from, from + count); continue; }
        ctx.fillStyle = c.lost; ctx.fillRect(x + from * strip / size, y + tall - 3, count * strip / size, 3);
      }
    for (let b = 0; b < blocks; b++) {
      const [x, y] = corner(b), v = replay.view(b), mine = chosen >= 0 && (v[0] === chosen || v[3] === chosen);
      ctx.strokeStyle = mine ? c.ink : c.edge; ctx.lineWidth = mine ? 3 : 0.7;
      ctx.strokeRect(x, y, strip, tall);
    }
  };
  const under = (event) => {
    const [x, y] = within(canvas, event);
    const column = Math.floor((x - gap / 2) / (strip + gap)), row = Math.floor((y - gap / 2) / (tall + gap));
    const b = row * columns + column;
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
  canvas.addEventListener('pointermove', (event) => {
    const hit = under(event);
    canvas.title = hit ? `block ${hit[0]}, slot ${hit[1]}: ${says(hit)}` : '';
  });
  canvas.addEventListener('click', (event) => {
    const hit = under(event), v = hit && replay.view(hit[0]), owned = hit && (rtAt(v, hit[1]) || beAt(v, hit[1]));
    choose(owned ? owned[0] : -1);
  });
  const said = (request) => (request < 0 ? 'choose a request, or click a slot, to see a block table'
    : `block table of ${data.owners[request]}: ${replay.blockTable(request).join(', ') || 'empty'}`);
  return { draw, said };
}
