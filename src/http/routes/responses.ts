import { Type } from '@sinclair/typebox'
import type { FastifyReply } from 'fastify'
import { tooLong } from '../body.ts'
import type { ProblemOptions, ProblemCode } from '../problem.ts'
import { MAX_IDENTITY_BYTES, type FieldError } from '../../identity/identity.ts'
import type { Failure, Verdict } from '../../identity/verdict.ts'

declare module 'fastify' {
  interface FastifyContextConfig {
    /** The schema of the headers for the OpenAPI document. Headers are always text, so they need no validation. */
    headers?: object
  }
}

/** Both identity routes report schema errors together with the rules that no schema can express. */
export const identityRoute = { attachValidation: true }

/** The error of an identity that has too many bytes. */
export const TOO_LONG: FieldError = { pointer: '', detail: tooLong(MAX_IDENTITY_BYTES) }

/** The credentials of a call, for the OpenAPI document. A relay without API_KEYS and JWT_* needs none. */
export const SECURITY = [{ bearer: [] }, { apiKey: [] }, {}]

export const BODY_TYPES = ['application/json', 'text/plain']

export const Headers = Type.Object({
  prefer: Type.Optional(Type.String({
    description: '`respond-async` (RFC 7240): respond with 202 as soon as the outbox has stored the event. ' +
      'Ignored while OUTBOX is `off`.'
  }))
})

/** Returns true when a `prefer` header has `respond-async`: a comma list of preferences with parameters (RFC 7240). */
export function prefersAsync (prefer: string | string[] | undefined): boolean {
  return prefer !== undefined && /(?:^|,)\s*respond-async\s*(?:[;,=]|$)/i.test(String(prefer))
}

/** Sets the status and headers of a response to identities that wait in the outbox. */
export function answerQueued (reply: FastifyReply, isAsync: boolean): FastifyReply {
  if (isAsync) reply.header('preference-applied', 'respond-async')
  return reply.code(202)
}

/** Returns a verdict as a problem. Both have the same codes. */
export function toProblem ({ code, reason, retryAfter }: Verdict & { code: Failure }): [ProblemCode, ProblemOptions] {
  return [code, { ...reason !== undefined && { detail: reason }, ...retryAfter !== undefined && { retryAfter } }]
}
