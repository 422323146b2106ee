import { createSecretKey, hash } from 'node:crypto'
import { errors, jwtVerify, type JWTPayload } from 'jose'
import { makeRoom } from '../../concurrency/make-room.ts'
import { createSemaphore } from '../../concurrency/semaphore.ts'
import type { Config } from '../../config.ts'
import { MAX_ID_BYTES } from '../../identity/ids.ts'
import type { Log } from '../../log.ts'
import { proxyFor } from '../../proxy.ts'
import { shortDigest, type Caller } from './caller.ts'
import { createJwks } from './jwks.ts'

/** A token is part of the headers, which may have 16 KB. */
const MAX_TOKEN_LENGTH = 8192

/** The most verified tokens in memory, each some 500 bytes. Beyond it the oldest are verified again. */
const MAX_CACHED = 10_000

/** A verification takes a tenth of a millisecond. The results of many at once would block a turn of the event loop. */
const MAX_VERIFYING = 8

/** How far the clock of the issuer may be ahead, for `nbf`. `exp` has no such tolerance. */
const CLOCK_TOLERANCE_S = 5

/** The algorithms of each kind of key. A token cannot choose the other kind. */
const SYMMETRIC = ['HS256']
const ASYMMETRIC = ['RS256', 'RS384', 'RS512', 'PS256', 'PS384', 'PS512', 'ES256', 'ES384', 'ES512', 'EdDSA', 'Ed25519']

/** The error of a token that proves nothing. `message` is for the log: a code of jose, or a noun phrase. */
class TokenError extends Error {}

export type UserTokens = Awaited<ReturnType<typeof createUserTokens>>

interface Verified { caller: Caller, expires: number }

/**
 * Resolves with a verifier of users' tokens (JWT) when the keys of the configuration are loaded; rejects with a
 * sentence when they cannot be.
 */
export async function createUserTokens (config: Config, log: Log) {
  const { JWT_JWKS_URL: url, JWT_ISSUER: issuer, JWT_AUDIENCE: audience, JWT_CLAIM: claim } = config
  const verified = new Map<string, Verified>()
  const verifying = createSemaphore(MAX_VERIFYING)
  /** Rises with each change of the keys. */
  let generation = 0
  const jwks = url === undefined
    ? undefined
    : await createJwks(url, { log, onChange: forgetAll, proxy: proxyFor(config, url) })
  let secret = config.JWT_SECRET
  let key = keyOf(secret)
  const options = {
    algorithms: jwks === undefined ? SYMMETRIC : ASYMMETRIC,
    requiredClaims: ['exp'],
    clockTolerance: CLOCK_TOLERANCE_S,
    ...issuer !== undefined && { issuer },
    ...audience !== undefined && { audience }
  }

  const verifySignature = (token: string) => verifying.run(() => jwks === undefined
    ? jwtVerify(token, key, options)
    : jwtVerify(token, jwks.getKey, options))

  /** Resolves with the claims of a token whose signature and claims are valid. */
  async function payloadOf (token: string, mayLook = true): Promise<JWTPayload> {
    try {
      return (await verifySignature(token)).payload
    } catch (error) {
      // No other token waits while the keys are fetched.
      if (mayLook && error instanceof errors.JWKSNoMatchingKey && await jwks?.lookForNew()) {
        return payloadOf(token, false)
      }
      throw new TokenError(error instanceof errors.JOSEError ? error.code : 'unusable key')
    }
  }

  return {
    /** Returns the caller of a token that has been verified before and has not expired. */
    find (token: string): Caller | undefined {
      const digest = digestOf(token)
      const entry = verified.get(digest)
      if (entry === undefined || entry.expires * 1000 > Date.now()) return entry?.caller
      verified.delete(digest)
      return undefined
    },

    /** Resolves with the caller of a token. Rejects with a TokenError. */
    async verify (token: string): Promise<Caller> {
      if (token.length > MAX_TOKEN_LENGTH) throw new TokenError('token too long')
      const before = generation
      const { exp: expires = 0, [claim]: id } = await payloadOf(token)
      if (expires * 1000 <= Date.now()) throw new TokenError('ERR_JWT_EXPIRED')
      if (typeof id !== 'string' || id === '' || id.length > MAX_ID_BYTES) throw new TokenError('unusable JWT_CLAIM')
      const caller: Caller = { kind: 'user', label: 'user', limitKey: `user:${shortDigest(id)}`, userId: id }
      // A key may have been withdrawn meanwhile.
      if (before === generation) remember(digestOf(token), { caller, expires })
      return caller
    },

    /** Takes JWT_SECRET of a changed configuration. Tokens that were signed with the earlier one fail from now on. */
    useSecret (changed: Config): void {
      if (changed.JWT_SECRET === secret) return
      secret = changed.JWT_SECRET
      key = keyOf(secret)
      forgetAll()
    },

    /** Returns the state of the keys, for operators; undefined with JWT_SECRET. */
    state: () => jwks?.state(),

    close: () => jwks?.close()
  }

  function forgetAll (): void {
    generation++
    verified.clear()
  }

  function remember (digest: string, entry: Verified): void {
    makeRoom(verified, MAX_CACHED)
    verified.set(digest, entry)
  }
}

const keyOf = (secret = '') => createSecretKey(Buffer.from(secret))
const digestOf = (token: string) => hash('sha256', token, 'base64')
