// Two runs at the same moment: a slider of times, two pools, and what each has achieved so far.
each('dashboard', (root, data) => {
  const status = root.querySelector('[role=status]'), { times_s: times, chart_height: high } = data;
  const select = root.querySelector('[data-request]'), names = [...select.options].slice(1).map((one) => one.text);
  const c = data.sides[0].pool.colours, last = times.length - 1;

  // 1. One side: its facts, its pool, who waits and why.
  const sides = data.sides.map((side, place) => {
    const box = root.querySelector(`[data-side="${place}"]`), waits = box.querySelector('[data-waits]');
    const fact = (kind) => box.querySelector(`[data-fact="${kind}"]`), detail = box.querySelector('[data-table]');
    let chosen = -1, at = 0, map = null;
    side.moments = side.moments.map((moment) => Object.fromEntries(data.fields.map((field, k) => [field, moment[k]])));
    side.moments.forEach((moment, i) => { moment.left_out ??= side.moments[i - 1].left_out; }); // said where it changes
    const split = (requests) => [requests.filter((one) => side.is_rt[one]), requests.filter((one) => !side.is_rt[one])];
    const list = (requests) => {
      const [rt, be] = split(requests), named = [...rt, ...be].slice(0, 6);
      const shown = named.map((one) => `${side.is_rt[one] ? 'RT' : 'BE'} ${side.pool.owners[one]}`).join(', ');
      return requests.length > 6 ? `${shown} and ${requests.length - 6} more` : shown;
    };
    const show = (moment) => {
      at = moment;
      const now = side.moments[moment], over = times[moment] >= side.end_s;
      const [rt, be] = split(now.left_out.flatMap((entry) => entry.slice(1)));
      fact('ran').textContent = over ? `nothing: over after ${side.end_s.toFixed(2)} s` : `${now.ran[0]} RT, ${now.ran[1]} BE`;
      fact('left').textContent = `${rt.length} RT, ${be.length} BE`;
      fact('rt').textContent = `${now.on_time} of ${now.finished} of ${now.arrived}`;
      fact('be').textContent = String(now.be_tokens);
      waits.replaceChildren(...now.left_out.map(([reason, ...requests]) => {
        const line = document.createElement('div'), why = document.createElement('b');
        why.textContent = `${data.reasons[reason]}: `; line.append(why, list(requests));
        return line;
      }));
      map.draw(moment, chosen);
      detail.textContent = chosen < 0 ? '' : map.said(chosen);
    };
    const choose = (name) => { chosen = side.pool.owners.indexOf(name); show(at); };
    const lay = (width) => {
      map = poolMap(box.querySelector('canvas[data-pool]'), side.pool, width, (request) => chooseName(side.pool.owners[request]));
    };
    return { show, choose, lay };
  });

  // A request is chosen in both runs: in the list, by keyboard, or by a click on one of its slots.
  const chooseName = (name) => {
    select.value = name === undefined ? -1 : names.indexOf(name);
    for (const side of sides) side.choose(name);
    root.dataset.chosen = name ?? '';
  };
  select.addEventListener('change', () => chooseName(names[Number(select.value)]));

  // 2. The curves: A dashed, B solid; up to the moment in their colour, beyond it pale. Each ends where its run ends.
  const charts = [...root.querySelectorAll('canvas[data-chart]')].map((canvas) => {
    const kind = canvas.dataset.chart, PAD = 12, left = 44, low = high - 32;
    let ctx = null, width = 0;
    const top = Math.max(1, ...data.sides.flatMap((side) => side.moments.map((moment) => moment[kind])));
    const x = (moment) => left + moment / last * (width - left - PAD), y = (value) => low - value / top * (low - 22);
    const dash = (place) => ctx.setLineDash(place === 0 ? [6, 3] : []);
    const line = (side, place, from, to, colour) => {
      const over = times.findIndex((time) => time >= side.end_s), end = over < 0 ? to : Math.min(to, over);
      ctx.strokeStyle = colour; ctx.lineWidth = 2; dash(place); ctx.beginPath();
      for (let i = from; i <= end; i++) ctx.lineTo(x(i), y(side.moments[i][kind]));
      ctx.stroke();
    };
    const axes = () => {
      ctx.setLineDash([]); ctx.fillStyle = c.ink; ctx.font = '11px system-ui, sans-serif';
      ctx.textAlign = 'right';
      for (const value of ticks(top, 4)) ctx.fillText(value.toLocaleString('en'), left - 4, y(value) + 4);
      ctx.textAlign = 'center';
      for (const value of ticks(times[last], 5)) ctx.fillText(String(value), x(value / times[last] * last), low + 14);
      ctx.fillText('seconds since the first arrival', (left + width) / 2, high - 4);
    };
    const show = (moment) => {
      ctx.fillStyle = c.paper; ctx.fillRect(0, 0, width, high);
      ctx.setLineDash([]); ctx.strokeStyle = c.edge; ctx.lineWidth = 1;
      ctx.strokeRect(left, 16, width - left - PAD, low - 16);
      ctx.strokeStyle = c.ink; ctx.beginPath(); ctx.moveTo(x(moment), 16); ctx.lineTo(x(moment), low); ctx.stroke();
      data.sides.forEach((side, place) => {
        line(side, place, moment, last, '#c3cad4');
        line(side, place, 0, moment, data.curves[place]);
      });
      axes();
      ctx.textAlign = 'left';
      data.names.forEach((name, place) => {
        const at = left + 4 + place * (width - left) / 2;
        ctx.strokeStyle = data.curves[place]; ctx.lineWidth = 2; dash(place);
        ctx.beginPath(); ctx.moveTo(at, 8); ctx.lineTo(at + 26, 8); ctx.stroke(); ctx.fillText(name, at + 32, 12);
      });
    };
    const lay = (available) => { width = available; ctx = sized(canvas, width, high); };
    return { show, lay };
  });

  const show = (moment) => {
    for (const one of [...sides, ...charts]) one.show(moment);
    status.textContent = `${times[moment].toFixed(2)} s of ${times[last].toFixed(2)} s since the first arrival`;
    root.dataset.step = moment;
  };
  const player = controls(root, show);
  for (const side of data.sides) paintKeys(root, side.pool.looks);
  follow(root, 1400, (available) => {
    const width = available < 700 ? available : Math.floor((available - 20) / 2);
    for (const one of [...sides, ...charts]) one.lay(width);
    show(player.value());
  });
});
