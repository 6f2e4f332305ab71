// Draws the causal mask of one sequence as `causal_mask.py: picture` does, for whatever the controls say. `root` holds
// the controls, the first picture and, as JSON, the geometry and the tokens. No kernel and no network are needed.
function explore(root) {
  root.dataset.ready = 'yes';
  const {labels, legend, top, left, cell, between, gap, width} =
    JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const control = (name) => root.querySelector(`[name=${name}]`), number = (name) => Number(control(name).value);
  const svg = root.querySelector('svg'), status = root.querySelector('[role=status]');
  const fixed = [...svg.children].slice(0, 2).map((child) => child.outerHTML).join(''); // patterns and style

  // 1. The setting. A query is never longer than its context, nor a row beyond the query.
  const setting = () => {
    const query = Math.min(number('query'), number('context'));
    control('query').value = query;
    control('row').max = query - 1;
    return {query, context: number('context'), size: number('block'), row: number('row'),
      flipped: control('reversed').value === 'yes', byColumn: control('column').value === 'yes'};
  };

  // 2. What each row does with each slot: `slot_kinds`.
  const places = (s) => Array.from({length: Math.ceil(s.context / s.size) * s.size}, (_, slot) => {
    const column = slot % s.size;
    return slot - column + (s.flipped ? s.size - 1 - column : column);
  });
  const kindOf = (s, row, slot, position) => {
    const at = s.context - s.query + row, own = position < s.context, visible = position <= at;
    const read = s.byColumn ? slot <= at : visible;
    if (visible) return read ? 'seen' : 'missed';
    return own ? (read ? 'early' : 'later') : (read ? 'foreign' : 'other');
  };

  // 3. The picture: `picture`.
  const picture = (s, position, kinds) => {
    const slotX = (slot) => left + slot * cell + Math.floor(slot / s.size) * gap, rows = [...kinds.keys()];
    const high = s.query * cell, second = top + high + between, parts = [];
    const box = (x, y, kind, row) => `<rect x="${x}" y="${y}" width="20" height="20" class="${kind}" data-row="${row}"/>`;
    parts.push(`<text x="0" y="${top - 22}">logical order</text><text x="0" y="${second - 42}">physical order</text>`);
    for (let p = 0; p < s.context; p++) {
      const x = left + p * cell, slot = position.indexOf(p);
      parts.push(`<text x="${x + 10}" y="${top - 5}" class="at">${p}</text>`);
      for (const r of rows) parts.push(box(x, top + r * cell, kinds[r][slot], r));
      if (['seen', 'early'].includes(kinds[s.row][slot]))
        parts.push(`<path d="M${x + 10} ${top + high}L${slotX(slot) + 10} ${second - 34}" class="way"/>`);
    }
    position.forEach((p, slot) => {
      const x = slotX(slot);
      if (slot % s.size === 0) parts.push(`<text x="${x}" y="${second + high + 15}">block ${slot / s.size}: slots ` +
        `${slot} to ${slot + s.size - 1}</text>`);
      parts.push(`<text x="${x + 10}" y="${second - 20}" class="at">${p < s.context ? p : '-'}</text>` +
        `<text x="${x + 10}" y="${second - 5}" class="at">${slot}</text>`);
      for (const r of rows) parts.push(box(x, second + r * cell, kinds[r][slot], r));
    });
    for (const r of rows) for (const y of [top, second]) {
      const at = s.context - s.query + r;
      parts.push(`<text x="${left - 6}" y="${y + r * cell + 14}" class="row">${at} ${labels[at]}</text>`);
    }
    for (const [y, wide] of [[top, s.context * cell], [second, slotX(position.length - 1) + 20 - left]])
      parts.push(`<rect x="${left - 2}" y="${y + s.row * cell - 2}" width="${wide + 4}" height="${cell + 4}" class="chosen"/>`);
    const end = (y, text) => `<text x="${left - 6}" y="${y}" class="row">${text}</text>`;
    parts.push(end(top - 5, 'token') + end(second - 20, 'holds token') + end(second - 5, 'slot'));
    const seen = legend.filter(([kind]) => kinds.some((row) => row.includes(kind)));
    seen.forEach(([kind, label], place) => {
      const x = left + place % 3 * 220, y = 2 + Math.floor(place / 3) * 20;
      parts.push(`<rect x="${x}" y="${y}" width="26" height="14" class="${kind}"/><text x="${x + 32}" y="${y + 12}">${label}</text>`);
    });
    return parts.join('');
  };

  // 4. The chosen row in a sentence: `mask_note`. Tokens come escaped, so this is markup.
  const note = (s, kinds) => {
    const at = s.context - s.query + s.row, mine = kinds[s.row];
    const slots = [...mine.keys()].filter((slot) => ['seen', 'early', 'foreign'].includes(mine[slot]));
    const wrong = mine.filter((kind) => ['missed', 'early', 'foreign'].includes(kind)).length;
    return `row ${s.row} is token ${at} (${labels[at]}): it must see tokens 0 to ${at}, and reads slots ` +
      slots.join(', ') + (wrong ? `; ${wrong} of these slots ${wrong === 1 ? 'is' : 'are'} wrong` : '');
  };

  // 5. What one can do: move a control, point at a row, click it.
  const show = () => {
    const s = setting(), position = places(s);
    const kinds = Array.from({length: s.query}, (_, row) => position.map((p, slot) => kindOf(s, row, slot, p)));
    svg.setAttribute('viewBox', `0 0 ${width} ${top + 2 * s.query * cell + between + 40}`);
    svg.innerHTML = fixed + picture(s, position, kinds);
    status.innerHTML = note(s, kinds);
    svg.setAttribute('aria-label', status.textContent);
    for (const input of root.querySelectorAll('input')) input.nextElementSibling.textContent = input.value;
    Object.assign(root.dataset, {query: s.query, context: s.context, block: s.size, row: s.row});
  };
  const choose = (event) => {
    const row = event.target.dataset?.row;
    if (row === undefined || row === control('row').value) return;
    control('row').value = row;
    show();
  };
  root.addEventListener('input', show);
  svg.addEventListener('pointerover', choose);
  svg.addEventListener('click', choose);
  show();
}
for (const root of document.querySelectorAll('[data-bros-mask]:not([data-ready])')) explore(root);
