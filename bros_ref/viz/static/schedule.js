// The schedule: rows of requests, columns of iterations, and the pool of the chosen one below. `data.runs` holds the
// same requests under one or several policies.
each('schedule', (root, data) => {
  const [status, detail] = root.querySelectorAll('[role=status]'), gantt = root.querySelector('canvas[data-gantt]');
  const [policy, find, grid] = ['[data-policy]', '[data-find]', '[data-grid]'].map((one) => root.querySelector(one));
  const { row_height: tall, head_height: head } = data, WAITS = ['waiting', 'pending'];
  const buttons = [...root.querySelectorAll('button[data-row]')];
  const cells = buttons.map((_, row) => ['does', 'slack', 'due'].map((kind) => root.querySelector(`[data-${kind}="${row}"]`)));
  let run = data.runs[0], { rows, moments, colours: c } = run, chosen = -1; // chosen: an index into run.owners
  let width = 0, room = 0, zoom = 1, first = 0, ctx = null, fills = {}, map = null;

  // 1. The part of the iterations that is shown: all of them, or as many as can be told apart around the chosen one.
  const cellWidth = () => {
    const all = width / moments.length, fitting = Math.max(data.min_cell, Math.min(data.max_cell, all));
    return Math.max(all, Math.min(4 * data.max_cell, fitting * zoom));
  };
  let wide = 0, shown = 0;
  const firstShown = (step) => Math.max(0, Math.min(moments.length - shown, step - Math.floor(shown / 2)));

  // 2. The chart.
  const draw = (step) => {
    wide = cellWidth(); shown = Math.min(moments.length, Math.floor(width / wide + 1e-6)); first = firstShown(step);
    const x = (at) => (at - first) * wide;
    ctx.fillStyle = c.paper; ctx.fillRect(0, 0, width, head + rows.length * tall);
    rows.forEach((row, i) => {
      const y = head + i * tall;
      if (row.request === chosen) { ctx.fillStyle = '#fff3c4'; ctx.fillRect(0, y, width, tall); }
      for (const [phase, from, to] of row.spans) {
        ctx.fillStyle = fills[`${row.rt ? 'rt' : 'be'}-${data.phases[phase]}`];
        ctx.fillRect(x(from), y + 3, (to - from) * wide, tall - 6);
      }
    });
    const classes = rows.findIndex((row) => !row.rt);
    ctx.strokeStyle = c.ink; ctx.lineWidth = 1;
    if (classes > 0) ctx.strokeRect(-1, head + classes * tall, width + 2, 0);
    ctx.lineWidth = 1.5;
    ctx.strokeRect(x(step), head - 2, wide, rows.length * tall + 1);
    rows.forEach((row, i) => marks(row, x, head + i * tall + tall / 2));
    axis(x);
  };
  const marks = (row, x, y) => {
    if (row.due_at !== null) {
      const at = x(row.due_at);
      ctx.fillStyle = c.alarm; ctx.strokeStyle = '#ffffff'; ctx.lineWidth = 1; ctx.beginPath();
      ctx.moveTo(at - 5, y - 8); ctx.lineTo(at + 5, y - 8); ctx.lineTo(at, y + 1); ctx.closePath(); ctx.fill(); ctx.stroke();
    }
    if (row.ttft_slo_s === null || !row.emitted.length) return;
    const at = x(row.emitted[0] + 1);
    ctx.strokeStyle = row.late ? c.alarm : c.ink; ctx.fillStyle = '#ffffff'; ctx.lineWidth = row.late ? 2.5 : 1.2; ctx.beginPath();
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
    if (reason === undefined && whom >= 0) return `${phase}: behind ${run.owners[whom]}`;
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
  const told = (step) => { // of the chosen request
    const i = rows.findIndex((row) => row.request === chosen);
    const said = i < 0 ? '' : [does(rows[i], i, step) || 'not yet here', ...[['slack', moments[step].slack_s[i]], ['due in', dueIn(rows[i], step)]]
      .filter(([, value]) => ms(value)).map(([name, value]) => `${name} ${ms(value)}`)].join('; ');
    return map.said(chosen) + (said && `. In this step: ${said}`);
  };

  // 4. One slider for both pictures; a request chosen in either is marked in both.
  const show = (step) => {
    draw(step); say(step); map.draw(step, chosen);
    status.textContent = `${run.policy}: step ${step + 1} of ${moments.length}, ${run.notes[step]}`;
    detail.textContent = told(step);
    Object.assign(root.dataset, { step, shown, chosen: chosen < 0 ? '' : run.owners[chosen] });
  };
  const player = controls(root, show);
  const choose = (request) => { chosen = request; show(player.value()); };
  buttons.forEach((button, i) => button.addEventListener('click', () => choose(chosen === rows[i].request ? -1 : rows[i].request)));
  const under = (event) => {
    const [x, y] = within(gantt, event), row = Math.floor((y - head) / tall), step = first + Math.floor(x / wide);
    return [row >= 0 && row < rows.length ? row : null, step >= 0 && step < moments.length ? step : null];
  };
  gantt.addEventListener('click', (event) => {
    const [row, step] = under(event);
    if (row !== null) chosen = rows[row].request;
    if (step !== null) player.go(step);
  });
  gantt.addEventListener('pointermove', (event) => {
    const [row, step] = under(event);
    gantt.title = row === null || step === null ? ''
      : `${run.owners[rows[row].request]}, step ${step + 1}: ${does(rows[row], row, step) || 'not yet here'}`;
  });

  // 5. Find a request by its id: the first step in which it is there. Zoom. Switch the policy at the same moment.
  const firstStep = (request) => {
    const row = rows.find((one) => one.request === request);
    if (row && row.spans.length) return row.spans[0][1];
    return run.steps.findIndex((changes) => changes.some((value, i) => (i % 8 === 1 || i % 8 === 4) && value === request));
  };
  find.addEventListener('change', () => {
    const wanted = find.value.trim(), found = wanted && run.owners.findIndex((name) => name === wanted);
    if (!wanted) return;
    if (found < 0) { detail.textContent = `no request is called ${wanted}`; return; }
    chosen = found;
    player.go(Math.max(0, firstStep(found)));
  });
  for (const button of root.querySelectorAll('[data-zoom-by]')) button.addEventListener('click', () => {
    wide = cellWidth(); // what is beyond the limits does not pile up
    const before = zoom;
    zoom *= Number(button.dataset.zoomBy);
    if (cellWidth() === wide) zoom = before;
    show(player.value());
  });
  const layMap = () => { map = poolMap(root.querySelector('canvas[data-pool]'), run, room, choose); };
  if (policy) policy.addEventListener('change', () => {
    const name = chosen < 0 ? null : run.owners[chosen], now_s = moments[player.value()].start_s;
    run = data.runs[Number(policy.value)];
    ({ rows, moments } = run);
    chosen = name === null ? -1 : run.owners.indexOf(name);
    layMap();
    player.limit(moments.length - 1);
    player.go(Math.max(0, moments.findLastIndex((moment) => moment.start_s <= now_s)));
  });

  // 6. The chart takes the width that the names and what is said leave; on a narrow page it is said of the chosen one.
  for (const each of data.runs) paintKeys(root, { ...each.looks, ...data.phase_looks });
  follow(root, 1400, (available) => {
    const narrow = available < 640, said = narrow ? [] : [Math.max(170, available * 0.24), 62, 66];
    room = available;
    width = Math.floor(available - data.name_width - said.reduce((sum, one) => sum + one, 0));
    grid.style.gridTemplateColumns = [data.name_width, width, ...said].map((one) => `${one}px`).join(' ');
    for (const one of root.querySelectorAll('[data-said]')) one.hidden = narrow;
    ctx = sized(gantt, width, head + rows.length * tall);
    fills = Object.fromEntries(Object.entries(data.phase_looks).map(([kind, look]) => [kind, hatch(ctx, look)]));
    layMap();
    show(player.value());
  });
});
