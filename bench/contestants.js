// The servers that are compared, and what each needs: `env`, and the command of those that are no script of Node.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { CREDENTIALS } from './credentials.js'

export const UPSTREAM = 18081

const folder = name => mkdtempSync(join(tmpdir(), `bench-${name}-`))

/** The environment of the relay with every feature on. The limit is counted, but no caller reaches it. */
const everything = port => ({
  ...CREDENTIALS.key.env,
  RATE_LIMIT_MAX: '1000000000',
  CORS_ORIGINS: 'https://app.example.com',
  METRICS_PORT: String(port + 100),
  OUTBOX: `file:${folder('outbox')}`
})

/** What all contestants have. */
const common = port => ({
  PORT: String(port),
  MIXPANEL_TOKEN: 'bench-token',
  MIXPANEL_URL: `http://127.0.0.1:${UPSTREAM}`,
  NODE_ENV: 'production'
})

/** As `npm start` runs it: node, its options, and the script. */
const { scripts } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8'))
const [, ...startArgs] = scripts.start.split(' ')
const relay = (env = {}) => ({
  env: port => ({ ...everything(port), ...env }),
  commandOf: node => [node, ...startArgs.map(arg => arg.replace('dist/', '../dist/'))]
})
const script = path => ({ env: () => ({}), commandOf: node => [node, path] })

const nginxPath = ['/usr/sbin/nginx', '/usr/bin/nginx'].find(path => spawnSync(path, ['-v']).status === 0)

function nginx () {
  const home = folder('nginx')
  return {
    env: () => ({}),
    commandOf (node, port) {
      writeFileSync(join(home, 'nginx.conf'), `daemon off; master_process off; pid ${home}/pid; error_log /dev/null;
        events { worker_connections 4096; }
        http { access_log ${home}/access.log; client_body_temp_path ${home}/body; proxy_temp_path ${home}/proxy;
          fastcgi_temp_path ${home}/f; uwsgi_temp_path ${home}/u; scgi_temp_path ${home}/s;
          upstream mixpanel { server 127.0.0.1:${UPSTREAM}; keepalive 512; }
          server { listen 127.0.0.1:${port}; keepalive_requests 100000000;
            location / { proxy_pass http://mixpanel/track; proxy_http_version 1.1; proxy_set_header Connection ""; } } }`)
      return [nginxPath, '-p', home, '-c', join(home, 'nginx.conf')]
    }
  }
}

export const BARE = 'bare Fastify, no relay'
export const OURS = 'this relay'
export const SDK = 'official SDK behind Fastify'
export const EXPRESS = 'Express + axios'

export const contestants = {
  [BARE]: script('contestants/bare.js'),
  [OURS]: relay(),
  'this relay, MAX_BATCH=1': relay({ MAX_BATCH: '1' }),
  [SDK]: script('contestants/sdk.js'),
  [EXPRESS]: script('contestants/express.js'),
  ...nginxPath && { 'nginx as a plain proxy': nginx() }
}

/** Returns the command and the environment of a contestant. */
export function launch (contestant, port, node = process.execPath, extra = {}) {
  return [contestant.commandOf(node, port), { ...common(port), ...contestant.env(port), ...extra }]
}
