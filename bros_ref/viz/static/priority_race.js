// Runs a priority race: a cursor over the chart that `priority_race.py` drew, and the standings of the step under it.
each('race', (root, data) => {
  const [follow, status, body, cursor] = ['[data-follow]', '[role=status]', 'tbody', '[data-cursor]'].map(
    (what) => root.querySelector(what));
  const c = data.colours, last = data.steps.length - 1;
  const share = (ms) => 100 * (ms - data.low_ms) / (data.high_ms - data.low_ms);

  // 1. A row of the standings.
  const box = (left, width, look) => {
    const part = document.createElement('div');
    part.style.cssText = `position:absolute;left:${left}%;width:${width};${look}`;
    return part;
  };
  const bar = (slack, ran) => {
    const axis = document.createElement('div'), from = Math.min(share(0), share(slack));
    axis.style.cssText = 'position:relative;height:14px;width:clamp(80px, 20vw, 200px)';
    const look = `top:1px;height:10px;border:1px solid ${c.rt};background:${ran ? c.rt : 'none'}`;
    axis.append(box(from, `${Math.abs(share(slack) - share(0))}%`, look));
    axis.append(box(share(0), '2px', `top:0;height:14px;background:${c.late}`));
    return axis;
  };
  const row = ([request, slack, ran, said]) => {
    const line = document.createElement('tr'), name = data.requests[request];
    const cells = [name, data.classes[request], slack === null ? 'no deadline' : `${slack.toFixed(0)} ms`,
      slack === null ? '' : bar(slack, ran), data.said[said]];
    for (const content of cells) {
      const cell = document.createElement('td');
      cell.style.textAlign = 'left';
      cell.append(content);
      line.append(cell);
    }
    line.dataset.request = name;
    line.dataset.ran = ran;
    line.style.fontWeight = name === follow.value ? 'bold' : 'normal';
    return line;
  };

  // 2. A step: the cursor, the words, the standings.
  const draw = (at) => {
    cursor.setAttribute('transform', `translate(${data.x[at]} 0)`);
    status.textContent = `step ${at + 1} of ${last + 1}, ${data.notes[at]}`;
    body.replaceChildren(...data.steps[at].map(row));
    for (const line of root.querySelectorAll('[data-line]')) {
      line.classList.toggle('chosen', line.dataset.line === follow.value);
      line.classList.toggle('faded', follow.value !== '' && line.dataset.line !== follow.value);
    }
    root.dataset.step = at;
  };

  // 3. What one can do: move, play, follow.
  const moved = controls(root, draw);
  follow.addEventListener('change', () => draw(moved.value()));
  draw(moved.value());
});
