import { createHmac } from 'node:crypto'
import fc from 'fast-check'
import type { Env } from './helper.ts'

export const KEYS = ['CANARY-KEY-3f9a51c07be2', 'CANARY-KEY-b06d48e2719f'] as const
const SECRET = 'CANARY-JWT-0d1c9f6e4b7a4f0f8e2a5c3b'
const [ISSUER, AUDIENCE] = ['https://login.example.com', 'relay']
export const USERS = ['user-a', 'user-b']
export const LISTED = 'https://app.example.com'

/** A relay on which nothing is possible without credentials. */
export const CLOSED: Env = {
  API_KEYS: `web:${KEYS.join()}`, JWT_SECRET: SECRET, JWT_ISSUER: ISSUER, JWT_AUDIENCE: AUDIENCE, CORS_ORIGINS: LISTED, RATE_LIMIT_MAX: '1000000000'
}

const encode = (value: unknown) => Buffer.from(JSON.stringify(value)).toString('base64url')

function sign (claims: object, { alg = 'HS256', digest = 'sha256', secret = SECRET } = {}): string {
  const signed = `${encode({ alg })}.${encode(claims)}`
  return `${signed}.${createHmac(digest, secret).update(signed).digest('base64url')}`
}

const now = Math.floor(Date.now() / 1000)
const claimsOf = (user: unknown) => ({ sub: user, iss: ISSUER, aud: AUDIENCE as unknown, exp: now + 36_000 as unknown })

/** All valid tokens, each with its user. */
const TOKENS = new Map(USERS.flatMap(user => [claimsOf(user), { ...claimsOf(user), aud: ['other', AUDIENCE], nbf: now - 10 }]
  .map(claims => [sign(claims), user] as const)))

const [claims, { exp, ...endless }] = [claimsOf('user-a'), claimsOf('user-a')]
const [token] = TOKENS.keys() as unknown as [string]
const [head, payload, signature] = token.split('.') as [string, string, string]

/** Tokens that prove nothing. */
const INVALID = [
  sign(claims, { alg: 'none' }), `${encode({ alg: 'none' })}.${payload}.`, `${encode({ alg: 'none' })}.${payload}.${signature}`,
  `${encode({ alg: 'NONE' })}.${payload}.`, `${encode({})}.${payload}.${signature}`, `${encode({ alg: 'HS256', crit: ['x'], x: 1 })}.${payload}.${signature}`,
  sign(claims, { alg: 'HS512', digest: 'sha512' }), sign(claims, { alg: 'HS384', digest: 'sha384' }), sign(claims, { alg: 'RS256' }), sign(claims, { alg: 'hs256' }),
  sign(claims, { secret: '' }), sign(claims, { secret: KEYS[0] }), sign(claims, { secret: SECRET.toLowerCase() }),
  sign({ ...claims, exp: now - 1 }), sign({ ...claims, exp: 0 }), sign({ ...claims, exp: String(exp) }), sign({ ...claims, exp: null }), sign(endless),
  sign({ ...claims, nbf: now + 36_000 }), sign({ ...claims, aud: 'other' }), sign({ ...claims, aud: [] }), sign({ ...claims, aud: undefined }),
  sign({ ...claims, iss: 'https://evil.example' }), sign({ ...claims, iss: undefined }),
  ...[undefined, '', 42, null, ['user-a'], { id: 'user-a' }, 'x'.repeat(256)].map(user => sign(claimsOf(user))),
  sign([claims]), `${head}.${encode(claimsOf('user-b'))}.${signature}`, `${head}.${payload}.`, `${head}.${payload}`, `.${payload}.${signature}`,
  `${token}.`, `${token}.${signature}`, `${head}.${head}.${signature}`, payload
]

const WRONG_KEYS = [
  '', 'wrong', 'web', `web:${KEYS[0]}`, KEYS.join(), `${KEYS[0]} ${KEYS[1]}`, `${KEYS[0]}x`, KEYS[0].slice(1), KEYS[0].slice(0, -1), KEYS[0].toLowerCase(), `"${KEYS[0]}"`,
  `${KEYS[0]}\0`, SECRET, 'x'.repeat(10_000)
]

const bearer = (credential: string): Env => ({ authorization: `Bearer ${credential}` })
const asKey = (credential: string): Env => ({ 'x-api-key': credential })

/** A key or token with one character changed. In the last one of a signature only some bits count. */
const changed = fc.record({
  text: fc.constantFrom(...KEYS, ...TOKENS.keys()), at: fc.nat(10_000), to: fc.constantFrom(...'AaZz09'), how: fc.constantFrom(bearer, asKey)
}).map(({ text, at, to, how }) => {
  const index = at % (text.length - 1)
  return how(text.slice(0, index) + (text[index] === to ? `${to}x` : to) + text.slice(index + 1))
})

/** The headers of services and of users. */
export const rightCredentials: fc.Arbitrary<Env> = fc.oneof(
  fc.constantFrom(...KEYS.flatMap(key => [bearer(key), asKey(key), { authorization: `bEaReR   ${key}` }, { ...bearer(key), ...asKey('wrong') }])),
  fc.constantFrom(...[...TOKENS.keys()].flatMap(token => [bearer(token), { ...bearer(token), ...asKey('wrong') }])))

/** The headers of all sorts of callers: about three in ten have a key, three a token, and four nothing that counts. */
export const credentials: fc.Arbitrary<Env> = fc.oneof(
  { weight: 12, arbitrary: rightCredentials },
  {
    weight: 2,
    arbitrary: fc.constantFrom<Env>({}, { authorization: '' }, { authorization: KEYS[0] }, { authorization: 'Bearer' }, { authorization: `Bearer\t${KEYS[0]}` },
      { authorization: `Bearer${KEYS[0]}` }, { authorization: `Basic ${Buffer.from(`${KEYS[0]}:`).toString('base64')}` }, { cookie: `authorization=Bearer ${KEYS[0]}` },
      { x_api_key: KEYS[0] }, { 'proxy-authorization': `Bearer ${KEYS[0]}` })
  },
  { weight: 1, arbitrary: fc.constantFrom(...WRONG_KEYS.flatMap(key => [bearer(key), asKey(key), { ...bearer(key), ...asKey(KEYS[0]) }])) },
  { weight: 2, arbitrary: fc.constantFrom(...INVALID.map(bearer), ...[...TOKENS.keys()].map(asKey), { ...bearer(INVALID[0] as string), ...asKey(KEYS[0]) }) },
  { weight: 2, arbitrary: changed })

/** A caller as the documentation defines it: a service, a user, or neither, which is 401. */
export type Sender = { kind: 'key' } | { kind: 'user', user: string } | { kind: 'none' }

/** Returns who sends a request with these headers. It compares texts, and knows nothing of JWT. */
export function senderOf (headers: { authorization?: string | undefined, 'x-api-key'?: string | undefined }): Sender {
  const bearer = /^Bearer(?: +|$)(.*)$/is.exec(headers.authorization ?? '')?.[1]
  const credential = bearer ?? headers['x-api-key'] ?? ''
  if (KEYS.some(key => key === credential)) return { kind: 'key' }
  const user = bearer === undefined ? undefined : TOKENS.get(canonical(bearer))
  return user === undefined ? { kind: 'none' } : { kind: 'user', user }
}

/** Returns a token with its signature in its usual spelling: base64url has several for the same bytes. */
function canonical (token: string): string {
  const end = token.lastIndexOf('.') + 1
  return token.slice(0, end) + Buffer.from(token.slice(end), 'base64url').toString('base64url')
}

/** Returns the secrets, and the beginning of any token, that `text` holds. */
export const secretsIn = (text: string) => /eyJ[\w-]{8}|CANARY/.exec(text)?.slice() ?? []
