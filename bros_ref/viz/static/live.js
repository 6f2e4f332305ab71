// The running server: frames come as server-sent events and are drawn with the players' own pool map. What is kept is
// bounded: two minutes of points, and a map that starts afresh after MAX_FRAMES frames.
(() => {
  const root = document.querySelector('[data-live]'), data = JSON.parse(document.getElementById('data').textContent);
  const find = (selector) => root.querySelector(selector), status = find('[data-status]');
  const MAX_FRAMES = 600, MAX_POINTS = 240;
  const points = [];
  let connection = null, map = null, pool = null, shown = [], chosen = -1;
  find('[data-about]').textContent = `Model ${data.model}, policy ${data.policy}, ${data.num_blocks} blocks of ${data.block_size} tokens.`;
  for (const [kind, label] of Object.entries(data.labels)) {
    const key = document.createElement('span'), sample = document.createElement('canvas');
    sample.dataset.key = kind; sample.setAttribute('aria-hidden', 'true');
    key.hidden = true; // until it is drawn
    key.append(sample, ` ${label}`); find('[data-legend]').append(key);
  }
  paintKeys(root, data.looks);

  const headers = () => {
    const key = find('input[name=key]').value;
    return { 'content-type': 'application/json', ...(key ? { authorization: `Bearer ${key}` } : {}) };
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // 1. The pool: each frame is a step of the players' data, holding the blocks that changed.
  const restart = () => {
    const old = find('canvas[data-pool]'), fresh = old.cloneNode();
    old.replaceWith(fresh);
    pool = { ...data, colours: { ...data.colours, paper: colour('--paper'), ink: colour('--ink'), edge: colour('--muted') },
      owners: [], steps: [], copies: [], kinds: [] };
    chosen = -1; shown = [];
    map = poolMap(fresh, pool, Math.max(320, Math.min(1480, fresh.parentElement.clientWidth)), (request) => { chosen = request; paint(); });
  };
  const paint = () => {
    if (!pool.steps.length) return;
    map.draw(pool.steps.length - 1, chosen);
    for (const key of root.querySelectorAll('[data-legend] canvas')) if (map.seen.has(key.dataset.key)) key.parentElement.hidden = false;
    find('[data-table]').textContent = map.said(chosen);
    list();
  };
  // A button for each request that holds blocks. Those that stay are kept, so a focus stays where it is.
  const list = () => {
    const held = new Map(), box = find('[data-requests]'), buttons = new Map([...box.children].map((one) => [one.dataset.name, one]));
    for (const view of shown.filter(Boolean)) for (const owner of [view[0], view[3]])
      if (owner >= 0) held.set(pool.owners[owner], (held.get(pool.owners[owner]) || 0) + 1);
    for (const [name, button] of buttons) if (!held.has(name)) button.remove();
    for (const [name, count] of held) {
      const number = pool.owners.indexOf(name), button = buttons.get(name) || document.createElement('button');
      button.type = 'button'; button.dataset.name = name;
      button.textContent = `${name}: ${count} block${count === 1 ? '' : 's'}`;
      button.setAttribute('aria-pressed', String(number === chosen));
      button.onclick = () => { chosen = number === chosen ? -1 : number; paint(); };
      if (!button.isConnected) box.append(button);
    }
    find('[data-nobody]').hidden = held.size > 0;
  };
  const ownersOf = (frame) => {
    const known = new Map(pool.owners.map((name, i) => [name, i]));
    return frame.owners.map((name) => (known.has(name) ? known.get(name) : pool.owners.push(name) - 1));
  };
  const changesOf = (frame) => {
    const numbers = ownersOf(frame), now = [], changes = [], owner = (i) => (i < 0 ? -1 : numbers[i]);
    for (let i = 0; i < frame.blocks.length; i += 8) {
      const [block, rt, rtIndex, rtFill, be, beIndex, beFill, lost] = frame.blocks.slice(i, i + 8);
      now[block] = [owner(rt), rtIndex, rtFill, owner(be), beIndex, beFill, lost];
    }
    for (let block = 0; block < data.num_blocks; block++) {
      const view = now[block] || [-1, 0, 0, -1, 0, 0, 0];
      if (String(view) !== String(shown[block] || [-1, 0, 0, -1, 0, 0, 0])) changes.push(block, ...view);
    }
    shown = now;
    return changes;
  };

  // 2. Numbers and charts.
  const facts = (frame) => {
    const last = points[points.length - 1], rate = (at) => (last ? last.tokens[at].toFixed(0) : '0');
    const rows = { 'real-time running, waiting': frame.running[0] + ', ' + frame.waiting[0],
      'best-effort running, waiting': frame.running[1] + ', ' + frame.waiting[1],
      'blocks in use': `${frame.used} of ${data.num_blocks}`,
      'least slack': frame.slack_s === null ? 'none waits' : `${Math.round(1000 * frame.slack_s)} ms`,
      'on time since start': `${frame.rt_on_time} of ${frame.rt_ended}`,
      'tokens/s, RT and BE': `${rate(0)} and ${rate(1)}`, steps: frame.step };
    find('[data-facts]').replaceChildren(...Object.entries(rows).map(([name, value]) => {
      const pair = document.createElement('div'), term = document.createElement('dt'), said = document.createElement('dd');
      term.textContent = name; said.textContent = value; pair.append(term, said);
      return pair;
    }));
    const reasons = Object.entries(frame.reasons).map(([reason, count]) => `${reason}: ${count}`);
    find('[data-reasons]').textContent = reasons.join('; ') || 'nobody';
  };
  const table = (frame) => find('[data-batches]').replaceChildren(...frame.batches.map((batch) => {
    const row = document.createElement('tr');
    for (const name of ['id', 'status', 'completed', 'failed', 'total']) {
      const cell = document.createElement('td');
      cell.textContent = batch[name]; row.append(cell);
    }
    return row;
  }));
  const chart = (canvas, series, top, shown = String) => {
    const width = Math.max(260, canvas.parentElement.clientWidth - 24), tall = 132, low = tall - 20, left = 44;
    const ctx = sized(canvas, width, tall), wide = width - left - 14;
    const x = (i) => left + wide - (points.length - i) * wide / MAX_POINTS, y = (value) => low - (low - 10) * value / top;
    ctx.clearRect(0, 0, width, tall);
    ctx.fillStyle = colour('--muted'); ctx.font = '11px system-ui, sans-serif'; ctx.strokeStyle = colour('--line'); ctx.textAlign = 'right';
    for (const value of ticks(top, 4)) {
      ctx.fillText(shown(value), left - 5, y(value) + 4);
      ctx.beginPath(); ctx.moveTo(left, y(value)); ctx.lineTo(left + wide, y(value)); ctx.stroke();
    }
    ctx.textAlign = 'center';
    for (const [share, said] of [[0, '2 min ago'], [0.5, '1 min'], [1, 'now']]) ctx.fillText(said, left + share * wide, tall - 5);
    series.forEach(([values, name, dash]) => {
      ctx.strokeStyle = colour(name); ctx.lineWidth = 2; ctx.setLineDash(dash); ctx.beginPath();
      let pen = false;
      values.forEach((value, i) => {
        if (value === null) { pen = false; return; }
        if (pen) ctx.lineTo(x(i), y(value)); else ctx.moveTo(x(i), y(value));
        pen = true;
      });
      ctx.stroke(); ctx.setLineDash([]);
    });
  };
  const plot = () => {
    chart(find('[data-chart=on_time]'), [[points.map((point) => point.share), '--rt', []]], 1, (share) => `${Math.round(100 * share)} %`);
    const rates = [0, 1].map((at) => points.map((point) => point.tokens[at]));
    chart(find('[data-chart=tokens]'), [[rates[0], '--rt', []], [rates[1], '--be', [6, 4]]], Math.max(1, ...rates[0], ...rates[1]));
  };
  let before = null;
  const measure = (frame) => {
    if (before && frame.time_s > before.time_s) {
      const seconds = frame.time_s - before.time_s, ended = frame.rt_ended - before.rt_ended;
      points.push({ tokens: ['rt_tokens', 'be_tokens'].map((name) => (frame[name] - before[name]) / seconds),
        share: ended ? (frame.rt_on_time - before.rt_on_time) / ended : (points.length ? points[points.length - 1].share : null) });
      if (points.length > MAX_POINTS) points.shift();
    }
    before = frame;
  };
  const take = (frame) => {
    if (pool === null || pool.steps.length >= MAX_FRAMES) restart();
    pool.steps.push(changesOf(frame)); pool.copies.push([]);
    measure(frame); facts(frame); table(frame); plot(); paint();
    root.dataset.frames = Number(root.dataset.frames || 0) + 1;
    if (status.textContent === 'connecting') status.textContent = 'connected';
  };

  // 3. The connection: fetch and not EventSource, which cannot send a key.
  const connect = async () => {
    if (connection) connection.abort();
    const mine = connection = new AbortController();
    status.textContent = 'connecting';
    try {
      const answer = await fetch('/dashboard/events', { headers: headers(), signal: mine.signal });
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = '';
      for (;;) {
        const { done, value } = await reader.read();
        if (done) throw new Error('the server has closed the connection');
        const events = (text + value).split('\n\n');
        text = events.pop();
        events.forEach((event) => take(JSON.parse(event.slice(6))));
      }
    } catch (error) { if (mine === connection && error.name !== 'AbortError') status.textContent = error.message; }
  };

  // 4. What the buttons send.
  const post = async (path, body) => {
    const answer = await fetch(path, { method: 'POST', headers: headers(), body: JSON.stringify(body) });
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error.message);
    return content;
  };
  const TOPICS = ['the sea', 'a train', 'winter', 'bread', 'a violin', 'the moon', 'a garden', 'a bridge'];
  const question = (topic) => ({ model: data.model, max_tokens: 48, messages: [{ role: 'user', content: `Tell me about ${topic}.` }] });
  const ask = () => Promise.all(TOPICS.map((topic) => post('/v1/chat/completions', question(topic)))).then((answers) => `${answers.length} questions answered`);
  const batch = async () => {
    const lines = [...Array(50).keys()].map((i) => JSON.stringify({ custom_id: `line-${i}`, method: 'POST', url: '/v1/chat/completions',
      body: question(`${TOPICS[i % TOPICS.length]}, part ${i}`) }));
    const form = new FormData();
    form.append('purpose', 'batch'); form.append('file', new Blob([lines.join('\n')]), 'dashboard.jsonl');
    const { 'content-type': _, ...key } = headers(), sent = await fetch('/v1/files', { method: 'POST', headers: key, body: form });
    const file = await sent.json();
    if (!sent.ok) throw new Error(file.error.message);
    const made = await post('/v1/batches', { input_file_id: file.id, endpoint: '/v1/chat/completions', completion_window: '24h' });
    return `${made.id} was made`;
  };
  const schedule = async () => {
    const answer = await fetch('/dashboard/schedule?seconds=10', { headers: headers() });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    find('[data-schedule]').hidden = false;
    find('[data-schedule] iframe').srcdoc = `<!doctype html><html lang="en"><title>schedule</title><body>${await answer.text()}`;
    return 'the schedule is below';
  };
  for (const [name, action] of Object.entries({ ask, batch, schedule })) {
    find(`[data-do=${name}]`).addEventListener('click', async () => {
      status.textContent = 'sent';
      try { status.textContent = await action(); } catch (error) { status.textContent = error.message; }
    });
  }
  find('[data-do=connect]').addEventListener('click', connect);
  addEventListener('resize', () => { pool = null; });
  connect();
})();
