import { Type, type FastifyPluginAsyncTypebox } from '@fastify/type-provider-typebox'
import type { FastifyReply } from 'fastify'
import { brokenRules, Identity } from '../identity.ts'
import { fieldErrors, problemResponses } from '../problem.ts'
import type { Relay } from '../relay.ts'
import type { Verdict } from '../verdict.ts'

const Flag = (description: string) =>
  Type.Optional(Type.Unsafe<'0' | '1'>({ type: 'string', enum: ['0', '1'], description }))

const Query = Type.Object({
  strict: Flag('`1`: Mixpanel validates the event, and its words come back.'),
  dry_run: Flag('`1`: answers the event that would be sent, its token masked, and sends nothing.')
}, { additionalProperties: false })

const Accepted = Type.Object({ status: Type.Literal('accepted') }, {
  description: 'Mixpanel accepted the event, which does not mean that it has merged or will merge the two ids.'
})

const Preview = Type.Object({
  event: Type.Literal('$identify'), properties: Type.Record(Type.String(), Type.Unknown())
}, { description: 'With dry_run=1: the event that would be sent.' })

/** `POST /identify`: one identity, one verdict. */
export const identify: FastifyPluginAsyncTypebox<{ relay: Relay }> = async (app, { relay }) => {
  app.post('/identify', {
    // The handler reports what the schema found together with the rules that no schema can express.
    attachValidation: true,
    config: { rateLimit: {} },
    schema: {
      operationId: 'identify',
      summary: 'Tell Mixpanel that an anonymous user is this user',
      consumes: ['application/json', 'text/plain'],
      body: Identity,
      querystring: Query,
      response: { 200: Type.Union([Accepted, Preview]), ...problemResponses() }
    }
  }, async (request, reply) => {
    const errors = fieldErrors(request.validationError, brokenRules(request.body))
    if (errors.length > 0) return reply.problem('invalid_request', { errors })
    const event = relay.accept(request.body)
    if (request.query.dry_run === '1') return reply.send(relay.preview(event))
    const verdict = await relay.identify(event, { strict: request.query.strict === '1' })
    reply.outcome = { insert_id: event.properties.$insert_id, ...'cause' in verdict && { cause: verdict.cause } }
    return answer(reply, verdict)
  })
}

/** A verdict's code is a problem's code, so the table of problems is the table of verdicts. */
function answer (reply: FastifyReply, verdict: Verdict): FastifyReply {
  if (verdict.code === 'accepted') return reply.send({ status: 'accepted' })
  return reply.problem(verdict.code, {
    ...'reason' in verdict && { detail: verdict.reason },
    ...'retryAfter' in verdict && { retryAfter: verdict.retryAfter }
  })
}
