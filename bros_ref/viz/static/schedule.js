// The schedule: rows of requests, columns of iterations, and the pool of the chosen one below.
each('schedule', (root, data) => {
  const [status, detail] = root.querySelectorAll('[role=status]'), gantt = root.querySelector('canvas[data-gantt]');
  const { rows, moments, row_height: tall, head_height: head, chart_width: width } = data;
  const cell = (kind, row) => root.querySelector(`[data-${kind}="${row}"]`);
  const cells = rows.map((_, row) => ['does', 'slack', 'due'].map((kind) => cell(kind, row)));
  const buttons = [...root.querySelectorAll('button[data-row]')];
  const rowOf = new Map(rows.map((row, i) => [row.request, i]));
  const ctx = sized(gantt, width, head + rows.length * tall);
  const fills = data.phases.map((phase) => hatch(ctx, data.looks[phase]));
  const WAITS = ['waiting', 'pending'], c = data.colours;

  // 1. The part of the iterations that is shown: all of them, or as many as can be told apart around the chosen one.
  const wide = Math.max(data.min_cell, Math.min(data.max_cell, width / moments.length));
  const shown = Math.min(moments.length, Math.floor(width / wide));
  const firstShown = (step) => Math.max(0, Math.min(moments.length - shown, step - Math.floor(shown / 2)));
  let chosen = -1, first = 0;

  // 2. The chart.
  const draw = (step) => {
    first = firstShown(step);
    const x = (at) => (at - first) * wide;
    ctx.fillStyle = c.paper; ctx.fillRect(0, 0, width, head + rows.length * tall);
    ctx.save(); ctx.beginPath(); ctx.rect(0, 0, width, head + rows.length * tall); ctx.clip();
    rows.forEach((row, i) => {
      const y = head + i * tall;
      if (row.request === chosen) { ctx.fillStyle = '#fff3c4'; ctx.fillRect(0, y, width, tall); }
      for (const [phase, from, to] of row.spans) {
        ctx.fillStyle = fills[phase]; ctx.fillRect(x(from), y + 3, (to - from) * wide, tall - 6);
      }
    });
    const classes = rows.findIndex((row) => !row.rt);
    ctx.strokeStyle = c.ink; ctx.lineWidth = 1;
    if (classes > 0) ctx.strokeRect(-1, head + classes * tall, width + 2, 0);
    ctx.strokeStyle = c.ink; ctx.lineWidth = 1.5;
    ctx.strokeRect(x(step), head - 2, wide, rows.length * tall + 1);
    rows.forEach((row, i) => marks(row, x, head + i * tall + tall / 2));
    axis(x);
    ctx.restore();
  };
  const marks = (row, x, y) => {
    if (row.due_at !== null) {
      const at = x(row.due_at);
      ctx.fillStyle = c.lost; ctx.strokeStyle = '#ffffff'; ctx.lineWidth = 1; ctx.beginPath();
      ctx.moveTo(at - 5, y - 8); ctx.lineTo(at + 5, y - 8); ctx.lineTo(at, y + 1); ctx.closePath(); ctx.fill(); ctx.stroke();
    }
    if (!row.rt || !row.emitted.length) return;
    const at = x(row.emitted[0] + 1);
    ctx.strokeStyle = row.late ? c.lost : c.ink; ctx.fillStyle = '#ffffff'; ctx.lineWidth = row.late ? 2.5 : 1.2;
    ctx.beginPath();
    if (row.late) { ctx.moveTo(at - 4, y - 4); ctx.lineTo(at + 4, y + 4); ctx.moveTo(at + 4, y - 4); ctx.lineTo(at - 4, y + 4); }
    else { ctx.arc(at, y, 3.5, 0, 7); ctx.fill(); }
    ctx.stroke();
  };
  const axis = (x) => {
    const every = [1, 2, 5, 10, 20, 50, 100].find((n) => n * wide >= 40) || 200;
    ctx.fillStyle = c.edge; ctx.font = '11px system-ui, sans-serif'; ctx.textAlign = 'center';
    for (let step = Math.ceil((first + 1) / every) * every; step <= first + shown; step += every)
      ctx.fillText(String(step), Math.min(width - 14, Math.max(8, x(step - 1) + wide / 2)), head - 8);
  };

  // 3. What each request does in the step, or why it does not, and until when its next token is due.
  const phaseAt = (row, step) => {
    for (const [phase, from, to] of row.spans) if (from <= step && step < to) return data.phases[phase];
    return null;
  };
  const does = (row, i, step) => {
    const moment = moments[step], phase = phaseAt(row, step), tokens = moment.ran[i];
    if (phase === null) return moment.start_s < row.arrival_s ? '' : 'has left';
    if (tokens !== undefined) return `${phase === 'restoring' ? 'restored, then ' : `${phase}, `}${tokens} token${tokens === 1 ? '' : 's'}`;
    const reason = moment.left_out[i], whom = moment.behind[row.rt ? 0 : 1];
    if (reason === undefined && whom >= 0) return `${phase}: behind ${data.owners[whom]}`;
    return `${phase}: ${data.reasons[reason === undefined ? data.reasons.length - 1 : reason]}`;
  };
  const dueIn = (row, step) => {
    if (!row.rt || phaseAt(row, step) === null) return null;
    let last = -1;
    for (const emitted of row.emitted) { if (emitted >= step) break; last = emitted; }
    const [from, target] = last < 0 ? [row.arrival_s, row.ttft_slo_s] : [moments[last].end_s, row.tpot_slo_s];
    return target === null ? null : from + target - moments[step].start_s;
  };
  const ms = (seconds) => (seconds === null || seconds === undefined ? '' : `${Math.round(1000 * seconds)} ms`);
  const say = (step) => rows.forEach((row, i) => {
    const said = does(row, i, step), due = dueIn(row, step), values = [said, ms(moments[step].slack_s[i]), ms(due)];
    cells[i].forEach((one, k) => { if (one.textContent !== values[k]) one.textContent = values[k]; });
    cells[i][0].style.color = WAITS.some((word) => said.startsWith(word)) ? '#8f1d14' : (said === 'has left' ? c.edge : c.ink);
    cells[i][2].style.fontWeight = due !== null && due < 0 ? '700' : '400';
    buttons[i].setAttribute('aria-pressed', String(row.request === chosen));
    for (const one of [buttons[i], ...cells[i]]) one.style.background = row.request === chosen ? '#fff3c4' : 'none';
  });

  // 4. One slider for both pictures; a request chosen in either is marked in both.
  const show = (step) => {
    draw(step); say(step); map.draw(step, chosen);
    status.textContent = `step ${step + 1} of ${moments.length}, ${data.notes[step]}`;
    detail.textContent = map.said(chosen);
    root.dataset.step = step; root.dataset.chosen = chosen < 0 ? '' : data.owners[chosen];
  };
  const player = controls(root, show);
  const choose = (request) => { chosen = request; show(player.value()); };
  const map = poolMap(root.querySelector('canvas[data-pool]'), data, 940, choose);
  buttons.forEach((button, i) => button.addEventListener('click', () => choose(chosen === rows[i].request ? -1 : rows[i].request)));
  gantt.addEventListener('click', (event) => {
    const [x, y] = within(gantt, event), row = Math.floor((y - head) / tall), step = first + Math.floor(x / wide);
    if (row >= 0 && row < rows.length) chosen = rows[row].request;
    if (step >= 0 && step < moments.length) player.go(step);
  });
  gantt.addEventListener('pointermove', (event) => {
    const [x, y] = within(gantt, event), row = Math.floor((y - head) / tall), step = first + Math.floor(x / wide);
    const inside = row >= 0 && row < rows.length && step >= 0 && step < moments.length;
    gantt.title = inside ? `${data.owners[rows[row].request]}, step ${step + 1}: ${does(rows[row], row, step) || 'not yet here'}` : '';
  });
  paintKeys(root, data.looks);
  show(player.value());
});
