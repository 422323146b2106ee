// What callers may carry, for --auth: the environment of the relay, and the credential of each request.
import { createHmac } from 'node:crypto'

const KEY = 'bench-key-0123456789abcdef'
const SECRET = 'bench-secret-0123456789abcdef0123456789'

const part = value => Buffer.from(JSON.stringify(value)).toString('base64url')

/** A token of that user for an hour, signed with HS256. */
function tokenOf (user) {
  const text = `${part({ alg: 'HS256' })}.${part({ sub: user, exp: Math.floor(Date.now() / 1000) + 3600 })}`
  return `${text}.${createHmac('sha256', SECRET).update(text).digest('base64url')}`
}

/** `distinct` users: the relay remembers 10,000 tokens, so with more than that each one is verified anew. */
export const CREDENTIALS = {
  none: {},
  key: { env: { API_KEYS: `bench:${KEY}` }, credentialOf: () => KEY },
  token: { env: { JWT_SECRET: SECRET }, credentialOf: tokenOf, distinct: 5000 },
  'new-token': { env: { JWT_SECRET: SECRET }, credentialOf: tokenOf, distinct: 20_000 }
}
