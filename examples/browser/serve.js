import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { SignJWT } from 'jose'

// Serves the page, and stands for your backend: it signs users in and gives them tokens for the relay.

const { PORT = '8000', RELAY_URL: relayUrl = 'http://127.0.0.1:8080', JWT_SECRET = '' } = process.env
const isAnonymous = JWT_SECRET === ''
const html = 'text/html; charset=utf-8'
const script = 'text/javascript; charset=utf-8'

const files = {
  '/': [new URL('index.html', import.meta.url), html],
  '/sdk.html': [new URL('sdk.html', import.meta.url), html],
  '/identify.js': [new URL('identify.js', import.meta.url), script],
  // The SDK is a copy of your own; none is loaded from a CDN.
  '/mixpanel.module.js': [new URL(import.meta.resolve('mixpanel-browser/dist/mixpanel.module.js')), script]
}

/** The user of each session. */
const sessions = new Map()

/** Resolves with a token for the relay. It expires soon, and the page asks for a new one when it needs one. */
const createToken = user => new SignJWT()
  .setProtectedHeader({ alg: 'HS256' })
  .setSubject(user)
  .setExpirationTime('60s')
  .sign(new TextEncoder().encode(JWT_SECRET))

async function answer ({ method, url, headers }) {
  const { pathname, searchParams } = new URL(url, 'http://localhost')
  const file = files[pathname]
  if (file !== undefined) return [200, { 'content-type': file[1] }, readFileSync(file[0])]
  switch (`${method} ${pathname}`) {
    case 'GET /config.json':
      return [200, { 'content-type': 'application/json' }, JSON.stringify({ relayUrl, isAnonymous })]
    // Without a password, because this is an example.
    case 'POST /sign-in': {
      const session = randomUUID()
      sessions.set(session, searchParams.get('user'))
      return [204, { 'set-cookie': `session=${session}; HttpOnly; SameSite=Strict; Path=/` }]
    }
    case 'GET /token': {
      // The session names the user. A user that the request names could be any.
      const user = sessions.get(/(?:^|; )session=([^;]+)/.exec(headers.cookie ?? '')?.[1])
      if (isAnonymous || user === undefined) return [401]
      return [200, { 'content-type': 'text/plain', 'cache-control': 'no-store' }, await createToken(user)]
    }
    default: return [404]
  }
}

const server = createServer(async (request, response) => {
  const [status, headers, body] = await answer(request).catch(() => [400])
  response.writeHead(status, headers).end(body)
})
server.listen(Number(PORT), '127.0.0.1', () => {
  const origin = `http://127.0.0.1:${server.address().port}`
  console.log(`Open ${origin} for a relay on ${relayUrl} that has CORS_ORIGINS=${origin}.`)
})
