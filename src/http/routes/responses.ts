import { Type } from '@sinclair/typebox'
import type { FastifyReply } from 'fastify'
import { tooLong } from '../body.ts'
import type { ProblemOptions, ProblemCode } from '../problem.ts'
import { MAX_IDENTITY_BYTES, type FieldError } from '../../identity/identity.ts'
import type { Verdict } from '../../identity/verdict.ts'

/** Of both routes: they report what the schema found together with the rules that no schema can express. */
export const identityRoute = { attachValidation: true }

/** What is wrong with an identity of too many bytes. */
export const TOO_LONG: FieldError = { pointer: '', detail: tooLong(MAX_IDENTITY_BYTES) }

export const BODY_TYPES = ['application/json', 'text/plain']

export const Headers = Type.Object({
  prefer: Type.Optional(Type.String({
    description: '`respond-async` (RFC 7240): answer 202 as soon as it is on disk. Ignored where OUTBOX is off.'
  }))
})

/** True for a caller who asks for a 202 at once. RFC 7240: a comma list of preferences, each with parameters. */
export function prefersAsync (prefer: string | undefined): boolean {
  return prefer !== undefined && /(?:^|,)\s*respond-async\s*(?:[;,=]|$)/i.test(prefer)
}

/** The status and headers of an answer to identities that wait in the outbox. */
export function answerQueued (reply: FastifyReply, isAsync: boolean): FastifyReply {
  if (isAsync) reply.header('preference-applied', 'respond-async')
  return reply.code(202)
}

/** A verdict's code is a problem's code: the table of problems is the table of verdicts. */
export function toProblem (
  verdict: Exclude<Verdict, { code: 'accepted' | 'queued' }>
): [code: ProblemCode, extras: ProblemOptions] {
  return [verdict.code, {
    ...'reason' in verdict && { detail: verdict.reason },
    ...'retryAfter' in verdict && { retryAfter: verdict.retryAfter }
  }]
}
