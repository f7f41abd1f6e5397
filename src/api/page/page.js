'use strict';
// The admin key lives in this variable and nowhere else: it goes when the page does.
let key = '';
const $ = (id) => document.getElementById(id);
// What the server says is set as text, never as markup.
const el = (name, text, act) => {
    const node = document.createElement(name);
    node.textContent = text;
    if (act) node.onclick = act;
    return node;
};
const show = (id, visible) => { $(id).hidden = !visible; };
const facts = (id, pairs) => $(id).replaceChildren(...pairs.filter(([, value]) => value)
    .flatMap(([name, value]) => [el('dt', name), el('dd', value)]));
const day = (time) => (time ? time.slice(0, 10) : '');
const minute = (time) => (time ? time.slice(0, 16).replace('T', ' ') + ' UTC' : '');

class Refused extends Error {}

async function ask(path, method = 'GET', body) {
    const headers = {};
    if (key) headers.Authorization = 'Bearer ' + key;
    if (body) headers['Content-Type'] = 'application/json';
    const options = { method, headers, body: body && JSON.stringify(body), cache: 'no-store' };
    const answer = await fetch(path, options).catch(() => { throw new Refused('The server does not answer.'); });
    const type = answer.headers.get('Content-Type') || '';
    const value = type.includes('json') ? await answer.json() : await answer.text();
    if (!answer.ok && path !== 'ready') throw new Refused(value.error || 'The server answered ' + answer.status + '.');
    return value;
}

// Health, for everybody.
const left = (metrics, name) => {
    const found = metrics.match(new RegExp('^mqtt_lite_' + name + '_timestamp_seconds ([0-9.e+]+)$', 'm'));
    if (!found) return '';
    const days = Math.floor((found[1] - Date.now() / 1000) / 86400);
    return (days < 0 ? 'ended ' + -days : days) + ' days' + (days < 0 ? ' ago' : '') + ', until '
        + new Date(found[1] * 1000).toISOString().slice(0, 10);
};
const since = (metrics) => {
    const found = metrics.match(/^mqtt_lite_store_since_timestamp_seconds ([0-9.e+]+)$/m);
    return found ? ', since ' + minute(new Date(found[1] * 1000).toISOString()) : '';
};

async function health() {
    try {
        const [health, ready, metrics] = await Promise.all([ask('health'), ask('ready'), ask('metrics')]);
        const { redis } = health;
        const away = redis.enabled && !redis.connected;
        const reasons = ready.reasons || [];
        $('state').textContent = reasons.length ? '✗ Not ready' : ready.warnings ? '⚠ Ready, with warnings' : '✓ Ready';
        const apart = Math.round((Date.parse(health.timestamp) - Date.now()) / 1000);
        facts('health', [
            ['Tokens are kept in', (health.storage === 'redis' ? 'Redis' : 'memory') + (away ? ': Redis is away' : '')
                + since(metrics)],
            ['Live tokens', String(redis.tokenCount)],
            ['Clock', minute(health.timestamp) + (Math.abs(apart) > 5 ? ', ' + apart + ' s from yours' : '')],
            ['CA', left(metrics, 'ca_expiry')],
            ['Revocation list', left(metrics, 'crl_expiry')],
            ['HTTPS certificate', left(metrics, 'tls_certificate_expiry')],
            ['Version', health.version + ', up for ' + Math.floor(health.uptime_seconds / 3600) + ' h '
                + Math.floor(health.uptime_seconds / 60) % 60 + ' min'],
        ]);
        $('warnings').replaceChildren(...[...reasons, ...ready.warnings || []].map((text) => el('li', text)));
    } catch (error) {
        $('state').textContent = '✗ ' + error.message;
    }
}

// The list, a page at a time.
async function list(after = '') {
    const query = new URLSearchParams({ limit: '50' });
    for (const [name, value] of [['after', after], ['q', $('q').value.trim()], ['state', $('filter').value]]) {
        if (value) query.set(name, value);
    }
    try {
        const page = await ask('api/v1/devices?' + query);
        $('error').textContent = '';
        $('rows').replaceChildren(...page.devices.map(row));
        show('empty', !page.devices.length && !page.next);
        $('first').disabled = !after;
        $('next').disabled = !page.next;
        $('next').onclick = () => list(page.next);
        show('login', false);
        show('list', true);
    } catch (error) {
        $('error').textContent = error.message;
    }
}

function row(device) {
    const line = el('tr', '');
    const name = el('td', '');
    name.append(el('button', device.device_id, () => open(device.device_id)));
    const { certificate } = device;
    line.append(name, el('td', device.state), el('td', certificate ? day(certificate.expires_at) : '–'),
        el('td', device.note || ''));
    return line;
}

// One device.
async function open(id, done = '') {
    try {
        const device = await ask('api/v1/devices/' + encodeURIComponent(id));
        $('device-title').textContent = id;
        facts('facts', [
            ['State', device.state],
            ['Enrolment', device.enrolment + (device.enrolment_expires_at ? ', until ' + minute(device.enrolment_expires_at) : '')],
            ['Certificate for', device.cert_days ? device.cert_days + ' days' : ''],
            ['Note', device.note],
            ['Last change', device.changed_at ? minute(device.changed_at) + (device.changed_by ? ', by ' + device.changed_by : '') : ''],
        ]);
        const items = device.certificates.map((certificate) => item(id, certificate));
        $('certificates').replaceChildren(...items.length ? items : [el('li', 'none')]);
        const blocked = device.state === 'blocked';
        const path = 'api/v1/certificates/' + encodeURIComponent(id);
        $('acts').replaceChildren(
            el('button', 'New secret …', () => { $('device').close(); register(id); }),
            el('button', 'Revoke …', () => act(id, 'Revoke all certificates of ' + id + '?', path, 'DELETE')),
            el('button', 'Revoke and block …', () => act(id, 'Revoke all certificates of ' + id + ', and block it?', path + '?block=true', 'DELETE')),
            blocked ? el('button', 'Unblock', () => change(id, false)) : el('button', 'Block …', () => change(id, true)),
        );
        $('done').textContent = done;
        if (!$('device').open) $('device').showModal();
    } catch (error) {
        $('error').textContent = error.message;
        $('done').textContent = error.message;
    }
}

function item(id, { serial_number: serial, status, created_at: from, expires_at: until, revoked_at: revoked }) {
    const line = el('li', status + ', ' + day(from) + ' to ' + day(until)
        + (revoked ? ', revoked ' + minute(revoked) : '') + ', ' + serial + ' ');
    line.append(el('button', 'Download', async () => {
        try {
            const { certificate } = await ask('api/v1/certificates/' + serial + '/download');
            const link = el('a', '');
            link.href = URL.createObjectURL(new Blob([certificate.content], { type: 'application/x-pem-file' }));
            link.download = certificate.filename;
            link.click();
            URL.revokeObjectURL(link.href);
        } catch (error) {
            $('done').textContent = error.message;
        }
    }));
    return line;
}

function sure(question) {
    $('sure-text').textContent = question;
    $('sure').returnValue = 'no';
    $('sure').showModal();
    return new Promise((resolve) => { $('sure').onclose = () => resolve($('sure').returnValue === 'yes'); });
}

async function act(id, question, path, method, body) {
    if (question && !await sure(question)) return;
    let said;
    try {
        const answer = await ask(path, method, body);
        said = 'Done.' + (answer.shared === false ? ' Here only: other instances learn of it when Redis is back.' : '');
    } catch (error) {
        said = error.message;
    }
    await open(id, said);
    list();
}

const change = (id, blocked) => act(id, blocked && 'Block ' + id + '? It gets nothing until it is unblocked; what it has stays valid.',
    'api/v1/devices/' + encodeURIComponent(id), 'PUT', { blocked });

// Registration: the secret is shown once.
function register(id = '') {
    $('new').reset();
    $('id').value = id;
    $('refused').textContent = '';
    show('new', true);
    show('secret', false);
    $('register').showModal();
}

async function fingerprint() {
    const pem = await ask('api/v1/ca');
    const der = Uint8Array.from(atob(pem.split('-----')[2].replace(/\s/g, '')), (c) => c.charCodeAt(0));
    const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', der));
    return [...hash].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

$('new').onsubmit = async (event) => {
    event.preventDefault();
    const id = $('id').value.trim();
    const body = { register: true, secret: true, expires_in: $('days').value * 86400 };
    if ($('cert-days').value) body.cert_days = Number($('cert-days').value);
    if ($('note').value.trim()) body.note = $('note').value.trim();
    try {
        const ca = await fingerprint();
        const answer = await ask('api/v1/devices/' + encodeURIComponent(id), 'PUT', body);
        $('text').textContent = answer.enrolment_secret;
        draw($('qr'), answer.enrolment_secret);
        // On the gateway itself its own name is not the one by which devices know it.
        const own = /^(localhost|127\..*|\[::1\])$/;
        $('line').textContent = 'enroll.sh --url ' + location.origin.replace(location.hostname, (host) => (own.test(host) ? 'GATEWAY' : host)) + ' --device-id ' + id
            + ' --dir /etc/mqtt --ca-fingerprint ' + ca + ' --secret-file secret';
        show('new', false);
        show('secret', true);
        list();
    } catch (error) {
        $('refused').textContent = error.message;
    }
};
$('register').onclose = () => {
    $('text').textContent = '';
    $('qr').replaceChildren();
};

// A QR code of up to 42 bytes: version 3, level M, one block (ISO/IEC 18004). Every mask is allowed; it
// is always the first here, whose format bits are the constant below.
function draw(svg, text) {
    const SIZE = 29, DATA = 44, CHECK = 26, FORMAT = 0b101010000010010;
    const bits = [];
    const put = (value, count) => { for (let i = count - 1; i >= 0; i--) bits.push(value >> i & 1); };
    put(4, 4);
    put(text.length, 8);
    for (const c of text) put(c.charCodeAt(0), 8);
    put(0, Math.min(4, DATA * 8 - bits.length));
    while (bits.length % 8) bits.push(0);
    for (let pad = 0xec; bits.length < DATA * 8; pad ^= 0xfd) put(pad, 8);
    const words = Array.from({ length: DATA }, (_, i) => parseInt(bits.slice(i * 8, i * 8 + 8).join(''), 2));

    const times = (a, b) => {
        let product = 0;
        for (let i = 7; i >= 0; i--) product = product << 1 ^ (product >> 7) * 0x11d ^ (b >> i & 1) * a;
        return product;
    };
    let generator = [1];
    for (let i = 0, root = 1; i < CHECK; i++, root = times(root, 2)) {
        generator = [...generator, 0].map((value, at) => value ^ times(generator[at - 1] || 0, root));
    }
    const rest = [...words, ...Array(CHECK).fill(0)];
    for (let i = 0; i < DATA; i++) {
        const factor = rest[i];
        generator.forEach((value, at) => { rest[i + at] ^= times(value, factor); });
    }
    const all = [...words, ...rest.slice(DATA)];

    const grid = Array.from({ length: SIZE }, () => Array(SIZE));
    const square = (x, y, radius, dark) => {
        for (let dy = -radius; dy <= radius; dy++) {
            for (let dx = -radius; dx <= radius; dx++) {
                if (grid[y + dy] && x + dx >= 0 && x + dx < SIZE) grid[y + dy][x + dx] = dark(Math.max(Math.abs(dx), Math.abs(dy)));
            }
        }
    };
    for (let i = 0; i < SIZE; i++) grid[6][i] = grid[i][6] = 1 - i % 2;
    for (const [x, y] of [[3, 3], [SIZE - 4, 3], [3, SIZE - 4]]) square(x, y, 4, (ring) => Number(ring !== 2 && ring !== 4));
    square(22, 22, 2, (ring) => Number(ring !== 1));
    for (let i = 0; i < 15; i++) {
        const bit = FORMAT >> i & 1;
        grid[i < 6 ? i : i < 8 ? i + 1 : SIZE - 15 + i][8] = bit;
        grid[8][i < 8 ? SIZE - 1 - i : i < 9 ? 7 : 14 - i] = bit;
    }
    grid[SIZE - 8][8] = 1;
    let at = 0;
    for (let right = SIZE - 1; right > 0; right -= 2) {
        if (right === 6) right = 5;
        for (let step = 0; step < SIZE; step++) {
            const y = (right + 1 & 2) === 0 ? SIZE - 1 - step : step;
            for (const x of [right, right - 1]) {
                if (grid[y][x] !== undefined) continue;
                const bit = all[at >> 3] >> 7 - (at & 7) & 1;
                grid[y][x] = bit ^ Number((x + y) % 2 === 0);
                at++;
            }
        }
    }
    const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
    path.setAttribute('d', grid.flatMap((line, y) => line.map((bit, x) => (bit ? `M${x + 4} ${y + 4}h1v1h-1z` : ''))).join(''));
    svg.replaceChildren(path);
}

// A key over plain HTTP could be read on the way; browsers call HTTPS and loopback secure.
if (!isSecureContext) {
    show('closed', true);
    for (const field of $('login').querySelectorAll('input, button')) field.disabled = true;
}
$('login').onsubmit = (event) => {
    event.preventDefault();
    key = $('key').value.trim();
    $('key').value = '';
    list();
};
$('search').onsubmit = (event) => {
    event.preventDefault();
    list();
};
$('filter').onchange = () => list();
$('first').onclick = () => list();
$('add').onclick = () => register();
$('cancel').onclick = () => $('register').close();
$('forget').onclick = () => {
    key = '';
    $('rows').replaceChildren();
    show('list', false);
    show('login', true);
    $('key').focus();
};
health();
setInterval(health, 10000);
